"""Files of a run directory: stage records, lock, drafter file. Also formats disk errors as one line."""
