"""Checkpoints that survive a crash: weights, optimizer and random state of every rank."""
