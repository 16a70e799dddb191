"""`python -m models.verify`: checks that an exported drafter is intact, fits its target, and is lossless."""
