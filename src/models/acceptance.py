"""Acceptance length, τ and its confidence interval, shared by training, decoding and reports."""

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Count = TypeVar("Count", int, Tensor)


def accepted_drafts(drafted: Tensor, predicted: Tensor) -> Tensor:
    """Count the leading drafts that equal the target's predictions. [..., n], [..., n] -> [...]."""
    return leading_true(drafted == predicted)


def leading_true(correct: Tensor) -> Tensor:
    """Return the length of the leading run of True. [..., n] -> [...]."""
    return correct.long().cumprod(-1).sum(-1)


def running_product(values: Tensor) -> Tensor:
    """Compute the cumulative product along the last dimension, deterministically even on GPUs. [..., n] -> [..., n].

    On a GPU, the reduction order of float `cumprod` (like that of `cumsum`) is not fixed, and PyTorch has no
    deterministic implementation.
    """
    before = torch.ones(values.shape[-1:] * 2, dtype=torch.bool, device=values.device).tril()  # [j, m]: m <= j
    return torch.where(before, values[..., None, :], 1.0).prod(-1)


def acceptance_length(accepted: Count) -> Count:
    """Return the acceptance length of a verify step: accepted drafts plus the bonus token."""
    return accepted + 1


def mean_acceptance_length(accepted: list[int]) -> float:
    """Return τ, the mean acceptance length over the verify steps of all prompts (micro average); NaN without steps."""
    if not accepted:
        return float("nan")
    return sum(acceptance_length(a) for a in accepted) / len(accepted)


def acceptance_by_slot(accepted: list[int], block_size: int) -> list[float]:
    """Return, for each slot j = 1 .. B-1, the fraction of verify steps that accepted it; non-increasing in j."""
    counts = torch.tensor(accepted, dtype=torch.long)
    return [float((counts >= slot).double().mean()) if accepted else float("nan") for slot in range(1, block_size)]


def tau_interval(
    accepted_by_prompt: list[list[int]], *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Compute a percentile bootstrap confidence interval for τ by resampling prompts.

    Prompts are resampled rather than steps: steps of the same prompt are correlated, so resampling them independently
    would give too narrow an interval. A local random generator makes the result reproducible.

    Args:
        accepted_by_prompt: for each prompt, the number of accepted drafts per verify step; prompts without steps are
            ignored.
        level: confidence level, the fraction of resamples within the interval.

    Returns:
        Lower and upper bounds; NaN if fewer than two prompts have steps, since the variance between prompts is then
        unknown.

    Raises:
        ValueError: level or resamples is out of range.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level}: expected a fraction in (0, 1).")
    if resamples < 1:
        raise ValueError(f"resamples={resamples}: expected at least 1.")
    counted = [accepted for accepted in accepted_by_prompt if accepted]
    if len(counted) < 2:
        return float("nan"), float("nan")
    steps = np.array([len(accepted) for accepted in counted])
    gained = np.array([sum(accepted) for accepted in counted]) + steps  # each step also gains the bonus token
    drawn = np.random.default_rng(seed).integers(len(counted), size=(resamples, len(counted)))
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(gained[drawn].sum(1) / steps[drawn].sum(1), tails)
    return float(low), float(high)
