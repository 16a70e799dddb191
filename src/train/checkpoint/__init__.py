"""Crash-safe checkpoints of the weights, the optimizer state and every rank's random state."""
