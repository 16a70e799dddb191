"""Greedy decoding, and sampling whose tokens do not depend on how they were drafted."""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, nan
from numbers import Real

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper

UNIT = 2**61  # fixed-point scale; cumulative sums fit in 64 bits
Warper = Callable[[None, Tensor], Tensor]


@dataclass(frozen=True)
class Sampling:
    """Sampling settings, named as in transformers and with the same semantics."""

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Validate the fields.

        Raises:
            ValueError: a field is out of range.
        """
        if not 0 <= _number(self.temperature) < inf:
            raise ValueError(f"temperature={self.temperature!r}: must be a finite number >= 0; 0 decodes greedily.")
        if not _number(self.top_k).is_integer() or self.top_k < 0:
            raise ValueError(f"top_k={self.top_k!r}: must be an integer >= 0; 0 keeps all tokens.")
        if not 0 < _number(self.top_p) <= 1:
            raise ValueError(f"top_p={self.top_p!r}: must be in (0, 1]; 1 keeps all tokens.")

    @property
    def greedy(self) -> bool:
        return float(self.temperature) == 0

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the sampling distribution [..., V] in float64; one-hot if greedy."""
        if self.greedy:
            return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
        flat = logits.reshape(-1, logits.shape[-1]).double()
        # Shift the maximum to 0: a small temperature could otherwise make several large logits overflow to inf and tie.
        flat = flat - flat.amax(-1, keepdim=True)
        for warp in self._warpers():
            flat = warp(None, flat)
        return flat.softmax(-1).view(logits.shape)

    def choose(self, logits: Tensor, uniforms: Tensor | None) -> Tensor:
        """Choose tokens [...] from logits [..., V], by argmax or by inverse transform sampling.

        Args:
            uniforms: [...] uniform samples in [0, 1), one per token, to look up in the cumulative distribution. A token
                depends only on its logits and its sample, not on the rest of the batch. Unused if greedy.
        """
        if self.greedy:
            return logits.argmax(-1)
        assert uniforms is not None
        cumulative = _cumulative(self.probabilities(logits))
        total = cumulative[..., -1]
        # Clamp below the total, so that rounding cannot select a token with probability 0 at the end.
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
        """Apply top-p like `TopPLogitsWarper`, but deterministically on GPUs: no float cumsum. [N, V] -> [N, V]."""
        ascending, order = logits.sort(-1)
        unlikely = _cumulative(ascending.softmax(-1)) <= round((1 - self.top_p) * UNIT)
        unlikely[..., -1] = False
        return logits.masked_fill(unlikely.scatter(-1, order, unlikely), -torch.inf)


def _cumulative(probabilities: Tensor) -> Tensor:
    """Compute the cumulative distribution in fixed point: [..., V] float64 -> [..., V] int64 in units of 1 / UNIT.

    Integer sums are exact, so the result does not depend on the device's order of summation.
    """
    return (probabilities * UNIT).long().cumsum(-1)


def _number(value: object) -> float:
    """Return a real number as a float, or NaN if it is not a real number or overflows."""
    try:
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else nan
    except OverflowError:
        return nan


GREEDY = Sampling()
