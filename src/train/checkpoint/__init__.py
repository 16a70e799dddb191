"""Crash-safe checkpoints: weights, optimizer state and the random state of every rank."""
