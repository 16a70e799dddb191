"""Acceptance, defined once: for training, decoding and reports."""

import torch
from torch import Tensor


def accepted_drafts(drafted: Tensor, predicted: Tensor) -> Tensor:
    """Number of leading drafts that equal the target's predictions. [..., n], [..., n] -> [...]."""
    return leading_true(drafted == predicted)


def leading_true(correct: Tensor) -> Tensor:
    """Length of the leading run of True. [..., n] -> [...]."""
    return correct.long().cumprod(-1).sum(-1)


def running_product(values: Tensor) -> Tensor:
    """Products of the leading 1, 2, ... n values. [..., n] -> [..., n].

    `cumprod` of floats, as `cumsum`, may add up in any order on a GPU, and PyTorch has no deterministic one.
    """
    before = torch.ones(values.shape[-1:] * 2, dtype=torch.bool, device=values.device).tril()  # [j, m]: m <= j
    return torch.where(before, values[..., None, :], 1.0).prod(-1)


def acceptance_length(accepted: int | Tensor) -> int | Tensor:
    """Tokens gained by one verify step: the accepted drafts and the bonus token."""
    return accepted + 1


def mean_acceptance_length(accepted: list[int]) -> float:
    """τ: mean acceptance length over all verify steps of all prompts (micro average); nan without steps."""
    if not accepted:
        return float("nan")
    return sum(acceptance_length(a) for a in accepted) / len(accepted)


def acceptance_by_slot(accepted: list[int], block_size: int) -> list[float]:
    """Share of verify steps in which slot j = 1 .. B-1 was accepted. Falls with j: a slot needs all before it."""
    counts = torch.tensor(accepted, dtype=torch.long)
    return [float((counts >= slot).double().mean()) if accepted else float("nan") for slot in range(1, block_size)]
