"""`python -m models.verify`: check that an exported drafter is intact, made for this target, and lossless on it."""
