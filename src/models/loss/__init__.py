"""Training objectives as pure functions, and their sum over all blocks in a batch."""
