"""Flex Decoding: drafting, verification, sampling, the KV cache, and a reference decoder for tests."""

from models.decoding.continuous import ContinuousDecoder
from models.decoding.flex import check_untested, generate
from models.decoding.sampling import Sampling
from models.decoding.selection import Selection

__all__ = ["ContinuousDecoder", "Sampling", "Selection", "check_untested", "generate"]
