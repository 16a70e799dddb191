"""Evaluation settings of the tests."""

from models.decoding.sampling import GREEDY
from models.decoding.selection import Selection
from train.evaluate.acceptance import (
    Decoding,
)

HOW = Decoding(max_new_tokens=24, sampling=GREEDY, selection=Selection(), batch_size=4)
