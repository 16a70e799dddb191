"""Flex Decoding: drafting, verification, sampling, the cache, and the reference decoder for tests."""

from models.decoding.flex import generate

__all__ = ["generate"]
