"""FLOPs and memory of a run, computed without running it, and GPU specifications."""
