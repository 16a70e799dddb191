"""Selective verification (paper, "Flex Decoding"): verify only the drafts that are likely to be accepted."""

from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from models.acceptance import leading_true, running_product

RULES = ("off", "cumulative_product", "min_confidence")


@dataclass(frozen=True)
class Selection:
    """Rule that selects the leading drafts to verify. The defaults are those of the code released with the paper."""

    rule: str = "cumulative_product"
    threshold: float = 0.01

    def __post_init__(self) -> None:
        """Validate the fields.

        Raises:
            ValueError: the rule is unknown, or the threshold is not a probability.
        """
        if self.rule not in RULES:
            raise ValueError(f"selection={self.rule!r}: expected one of {', '.join(RULES)}.")
        number = isinstance(self.threshold, Real) and not isinstance(self.threshold, bool)
        if not number or not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold!r}: must be a probability in [0, 1].")

    def count(self, confidence: Tensor) -> Tensor:
        """Return the number of leading drafts to verify [...], at least 1, given their confidence [..., B-1]."""
        if self.rule == "off":
            return torch.full(confidence.shape[:-1], confidence.shape[-1], device=confidence.device)
        likely = running_product(confidence) if self.rule == "cumulative_product" else confidence
        return leading_true(likely >= self.threshold).clamp(min=1)


OFF = Selection("off")
RELEASE = Selection()  # defaults of the code released with the paper


def drafts_and_confidence(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the most likely token of each slot and its float32 probability: [..., V] -> [...], [...].

    Non-finite logits give an arbitrary token with probability 0.
    """
    best, drafts = logits.max(-1)
    return drafts, (best.float() - logits.float().logsumexp(-1)).exp().nan_to_num(0.0)
