"""FLOPs, memory and hardware figures of a run, from the sizes alone. Needs no torch."""
