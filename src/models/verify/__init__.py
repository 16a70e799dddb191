"""`python -m models.verify`: is an exported drafter intact, made for this target, and lossless on it?"""
