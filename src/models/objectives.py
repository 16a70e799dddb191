"""Losses of drafted slots as pure functions. Sums and counts are divided once, by the caller, over all ranks."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from data.batch import IGNORE

LogitsFunction = Callable[[Tensor, Tensor | None], Tensor]


def token_losses(
    logits_of: LogitsFunction, hidden: Tensor, bonus: Tensor | None, labels: Tensor, pieces: int = 1
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each slot, holding the logits of one piece of the slots at a time, in the backward pass too.

    Args:
        logits_of: (hidden [n, H], bonus [n] or None) -> logits [n, V].
        hidden: [n, H]. bonus: [n] or None. labels: [n], without IGNORE.
        pieces: how many; `logits_of` is called as often, whatever n is.

    Returns:
        losses [n] in nats, and whether the most likely token is the label [n].
    """

    def losses(hidden: Tensor, bonus: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits_of(hidden, bonus).float()
        return F.cross_entropy(logits, labels, reduction="none"), logits.detach().argmax(-1) == labels

    if pieces == 1:
        return losses(hidden, bonus, labels)
    bonuses = [None] * pieces if bonus is None else bonus.tensor_split(pieces)
    # Without recomputation, autograd would keep every piece's logits for the backward pass.
    parts = [
        checkpoint(losses, *arguments, use_reentrant=False)
        for arguments in zip(hidden.tensor_split(pieces), bonuses, labels.tensor_split(pieces), strict=True)
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def dpace_weights(losses: Tensor, supervised: Tensor, alpha: float) -> Tensor:
    """D-PACE (arXiv 2605.18810): weight of a slot = how much of the expected acceptance length hangs on it.

    q = exp(-loss), q~ = (1 - alpha) q + alpha, w_j = sum over m >= j of the product of q~ up to m. Detached.

    Args:
        losses: [..., n] of the drafted slots, in order. supervised: [..., n] bool, True up to some slot.

    Returns:
        [..., n], 0 where unsupervised.
    """
    confidence = (1 - alpha) * torch.exp(-losses.detach()) + alpha
    reach = torch.cumprod(torch.where(supervised, confidence, 0.0), dim=-1)
    return reach.flip(-1).cumsum(-1).flip(-1) * supervised


def decay_weights(supervised: Tensor, gamma: float) -> Tensor:
    """Fixed decay: slot k = 1 .. n weighs exp(-(k - 1) / gamma). [..., n] bool -> [..., n]."""
    slots = torch.arange(supervised.shape[-1], device=supervised.device)
    return torch.exp(-slots / gamma) * supervised


def block_loss(
    logits_of: LogitsFunction,
    hidden: Tensor,
    labels: Tensor,
    bonus: Tensor | None,
    *,
    weights: str,
    alpha: float,
    gamma: float,
    slot0_loss: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted cross-entropy of the slots of all blocks.

    Args:
        hidden: [R, A, B, H]. labels: [R, A, B] with IGNORE. bonus: [R, A] or None.
        weights: `dpace`, `decay` or `flat`.
        slot0_loss: whether slot 0, which decoding discards for the bonus token, is trained like the drafted slots.

    Returns:
        sum of weighted losses, sum of weights (detached), and correct [R, A, B-1]: the most likely token of a drafted
        slot is its label. The mean over a global batch is the sum of the first over the sum of the second.
    """
    first = 0 if slot0_loss else 1
    labels, hidden = labels[..., first:], hidden[..., first:, :]
    supervised = labels != IGNORE
    if bonus is not None:
        bonus = bonus[..., None].expand_as(labels)[supervised]
    # By shape, not by how many slots are supervised: under ZeRO 3 every call of the head gathers it from all ranks, and
    # a rank that calls it more often than the others waits for ever, or takes another layer's weights for it.
    pieces = -(-labels.numel() // chunk)
    values, hits = token_losses(logits_of, hidden[supervised], bonus, labels[supervised], pieces)
    losses = torch.zeros(labels.shape, dtype=values.dtype, device=values.device).masked_scatter(supervised, values)
    correct = torch.zeros_like(supervised).masked_scatter(supervised, hits)
    if weights == "dpace":
        weight = dpace_weights(losses, supervised, alpha)
    elif weights == "decay":
        weight = decay_weights(supervised, gamma)
    elif weights == "flat":
        weight = supervised.to(losses.dtype)
    else:
        raise ValueError(f"weights={weights!r}: expected dpace, decay or flat.")
    return (losses * weight).sum(), weight.sum(), correct[..., 1 - first :]
