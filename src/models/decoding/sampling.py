"""Which token the target says: the most likely one, or one drawn from its distribution."""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, nan
from numbers import Real

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper

UNIT = 2**61  # their sum, rounded up, is within 64 bits
Warper = Callable[[None, Tensor], Tensor]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen from logits, with the meaning that `transformers` gives these names."""

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: out of range.
        """
        if not 0 <= _number(self.temperature) < inf:
            raise ValueError(f"temperature={self.temperature!r}: expected 0 (greedy) or more.")
        if not _number(self.top_k).is_integer() or self.top_k < 0:
            raise ValueError(f"top_k={self.top_k!r}: expected 0 (all tokens) or more, a whole number.")
        if not 0 < _number(self.top_p) <= 1:
            raise ValueError(f"top_p={self.top_p!r}: expected more than 0, at most 1 (all tokens).")

    @property
    def greedy(self) -> bool:
        return float(self.temperature) == 0

    def probabilities(self, logits: Tensor) -> Tensor:
        """[..., V] the distribution that tokens are drawn from, in float64; one-hot if greedy."""
        if self.greedy:
            return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
        flat = logits.reshape(-1, logits.shape[-1]).double()
        # The greatest becomes 0: divided by a small temperature, several great ones would become infinite, and equal.
        flat = flat - flat.amax(-1, keepdim=True)
        for warp in self._warpers():
            flat = warp(None, flat)
        return flat.softmax(-1).view(logits.shape)

    def choose(self, logits: Tensor, uniforms: Tensor | None) -> Tensor:
        """[...] tokens from logits [..., V].

        Args:
            uniforms: [...] in [0, 1), one for each token: the point of the cumulative distribution at which it lies.
                So a token depends on logits and its own number alone, not on what else is computed beside it. Not used
                by greedy decoding.
        """
        if self.greedy:
            return logits.argmax(-1)
        cumulative = _cumulative(self.probabilities(logits))
        total = cumulative[..., -1]
        # Below the sum, so that rounding cannot reach beyond the last token that may be drawn.
        point = (uniforms.double() * total.double()).long().minimum(total - 1)
        return torch.searchsorted(cumulative, point[..., None], right=True)[..., 0]

    def _warpers(self) -> list[Warper]:
        warpers: list[Warper] = [TemperatureLogitsWarper(float(self.temperature))]
        if self.top_k:
            warpers.append(TopKLogitsWarper(int(self.top_k)))
        if self.top_p < 1:
            warpers.append(self._most_likely)
        return warpers

    def _most_likely(self, ids: None, logits: Tensor) -> Tensor:
        """`TopPLogitsWarper`, which adds up floats: no deterministic operation on a GPU. [N, V] -> [N, V]."""
        ascending, order = logits.sort(-1)
        unlikely = _cumulative(ascending.softmax(-1)) <= round((1 - self.top_p) * UNIT)
        unlikely[..., -1] = False
        return logits.masked_fill(unlikely.scatter(-1, order, unlikely), -torch.inf)


def _cumulative(probabilities: Tensor) -> Tensor:
    """[..., V] float64 that add up to 1 -> [..., V] their running sums in units of 1 / UNIT, as whole numbers.

    These are exact, so the same in whatever order a device adds them up.
    """
    return (probabilities * UNIT).long().cumsum(-1)


def _number(value: object) -> float:
    """A real number as a float; NaN if it is none, or has no float."""
    try:
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else nan
    except OverflowError:
        return nan


GREEDY = Sampling()
