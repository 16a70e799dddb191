"""What a run directory holds: stage records, the lock, the drafter file; disk errors in one line."""
