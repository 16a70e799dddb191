"""The `Document` dataclass."""

from dataclasses import dataclass

import numpy as np


@dataclass
class Document:
    """A tokenized conversation, or one of several documents made from it if the template rewrites earlier turns."""

    input_ids: np.ndarray  # [tokens] int32
    supervised: np.ndarray  # [tokens] bool, True for tokens that the assistant generates, including end of turn
