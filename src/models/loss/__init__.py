"""Training objectives as pure functions, and their sum over the blocks of a batch."""
