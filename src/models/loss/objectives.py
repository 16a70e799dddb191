"""Losses for drafted slots as pure functions. They return sums; the caller normalizes once, across all ranks.

Gradients with respect to the logits are derived by hand and overwrite the logits in place. Existing fused losses cannot
be used, since D-PACE weights are known only once all losses in a block are. Tests compare the gradients with autograd
in float64. Shapes as in `data.batch`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from data.batch import IGNORE
from models.acceptance import running_product

WEIGHTS = ("dpace", "decay", "flat")


@dataclass(frozen=True)
class Objective:
    """Loss terms per slot, and the weighting of slots within a block.

    The loss of a slot is `ce * CE + kl * KL + tv * TV` (CE and KL in nats), where q is the draft's distribution and p
    the target's at the same position: CE = -log q(label), KL = KL(p || q), TV = 1/2 sum |p - q|. 1 - TV is the
    acceptance probability of the draft under sampling (arXiv 2211.17192, section 3).
    """

    ce: float = 1.0
    kl: float = 0.0
    tv: float = 0.0
    weights: str = "dpace"
    alpha: float = 0.5  # for weights=dpace
    gamma: float = 4.0  # for weights=decay
    temperature: float = 1.0  # applied to p and q

    def __post_init__(self) -> None:
        """Validate the fields.

        Raises:
            ValueError: a field is out of range, or the weights are unknown.
        """
        if min(self.ce, self.kl, self.tv) < 0 or not self.ce + self.kl + self.tv > 0:
            raise ValueError(
                f"ce={self.ce}, kl={self.kl}, tv={self.tv}: must be non-negative, at least one of them positive."
            )
        if self.weights not in WEIGHTS:
            raise ValueError(f"weights={self.weights!r}: expected one of {', '.join(WEIGHTS)}.")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha}: must be in [0, 1].")
        if not (self.gamma > 0 and self.temperature > 0):
            raise ValueError(f"gamma={self.gamma}, temperature={self.temperature}: expected positive values.")

    @property
    def needs_target(self) -> bool:
        """Whether the objective uses the target's distribution."""
        return self.kl > 0 or self.tv > 0


def dpace_weights(confidence: Tensor, supervised: Tensor, alpha: float) -> Tensor:
    """Compute D-PACE slot weights (arXiv 2605.18810): how much of the expected acceptance length depends on a slot.

    With q~ = (1 - alpha) q + alpha, w_j is the sum over m >= j of q~_1 * ... * q~_m. The weights carry no gradient.

    Args:
        confidence: [..., n] acceptance probability q of each drafted slot, in order.
        supervised: [..., n] bool, a prefix of True.

    Returns:
        [..., n] weights, 0 where unsupervised.
    """
    softened = (1 - alpha) * confidence.detach() + alpha
    reach = running_product(torch.where(supervised, softened, 0.0))
    later = torch.ones(reach.shape[-1:] * 2, dtype=torch.bool, device=reach.device).triu()  # [j, m]: m >= j
    return torch.where(later, reach[..., None, :], 0.0).sum(-1) * supervised


def decay_weights(supervised: Tensor, gamma: float) -> Tensor:
    """Compute exponentially decaying weights: exp(-(k - 1) / gamma) for slot k = 1 .. n. [..., n] bool -> [..., n]."""
    slots = torch.arange(supervised.shape[-1], dtype=torch.float64, device=supervised.device)
    return torch.exp(-slots / gamma) * supervised


def slot_weights(objective: Objective, confidence: Tensor, supervised: Tensor) -> Tensor:
    """Compute slot weights [..., n] by the objective's rule; see `dpace_weights` for the arguments."""
    if objective.weights == "dpace":
        return dpace_weights(confidence, supervised, objective.alpha)
    if objective.weights == "decay":
        return decay_weights(supervised, objective.gamma).to(confidence.dtype)
    return supervised.to(confidence.dtype)


@dataclass(frozen=True)
class Piece:
    """Labeled slots of consecutive complete blocks, processed as one chunk."""

    slots: Tensor  # [n] indices among all R*A*B slots
    labels: Tensor  # [n]; IGNORE for labels masked by the caller
    grid_indices: Tensor  # [n] indices into the flattened `shape` grid of trained slots
    shape: tuple[int, int]  # blocks, trained slots per block


def piece_loss(
    logits: Tensor, teacher: Tensor | None, piece: Piece, objective: Objective, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Compute the weighted loss of a piece. Overwrites `logits` and `teacher`.

    Args:
        logits, teacher: [n, V] draft and target logits in float32 or wider; `teacher` only if the objective needs it.

    Returns:
        Sum of weighted losses, sum of weights, whether the top-1 token is the label [n], and the gradient of the loss
        sum with respect to `logits`, which reuses their memory (None without `with_gradient`).
    """
    used = piece.labels != IGNORE
    labels = torch.where(used, piece.labels, 0)[:, None]
    if objective.temperature != 1:
        logits /= objective.temperature
    top, best = logits.max(dim=-1, keepdim=True)
    at_label = logits.gather(1, labels)
    logits -= top
    if objective.needs_target:
        assert teacher is not None
        target = _softmax(teacher, objective.temperature)  # p
        # KL = sum p log p - sum p z + log sum exp z; xlogy is 0 at p = 0.
        divergence = torch.special.xlogy(target, target).sum(-1) - (target * logits).sum(-1)
    total = logits.exp_().sum(-1, keepdim=True)
    log_total = total.log()
    draft = logits.div_(total)  # q
    cross_entropy = (log_total + top - at_label)[:, 0]
    values, confidence = objective.ce * cross_entropy, torch.exp(-cross_entropy)
    if objective.needs_target:
        difference = draft - target
        variation = torch.linalg.vector_norm(difference, ord=1, dim=-1) / 2  # TV; abs() would allocate another [n, V]
        values = values + objective.kl * (divergence + log_total[:, 0]) + objective.tv * variation
        confidence = 1 - variation
    weights = _piece_weights(confidence, used, piece, objective)
    loss, weight, correct = (values * weights).sum(), weights.sum(), (best == labels)[:, 0] & used
    if not with_gradient:
        return loss, weight, correct, None
    scale = weights[:, None] / objective.temperature
    if objective.needs_target:
        step = difference.sign_().mul_(draft).div_(2)  # q times the derivative of TV with respect to q
        draft.mul_(objective.ce + objective.kl - objective.tv * step.sum(-1, keepdim=True))
        draft.add_(step, alpha=objective.tv).sub_(target, alpha=objective.kl).mul_(scale)
    else:
        draft.mul_(objective.ce * scale)
    return loss, weight, correct, draft.scatter_add_(1, labels, -objective.ce * scale)


def _softmax(logits: Tensor, temperature: float) -> Tensor:
    """Apply softmax with temperature, in place."""
    if temperature != 1:
        logits /= temperature
    logits -= logits.amax(-1, keepdim=True)
    return logits.exp_().div_(logits.sum(-1, keepdim=True))


def _piece_weights(confidence: Tensor, used: Tensor, piece: Piece, objective: Objective) -> Tensor:
    """Compute the weights [n] of a piece's slots by arranging their confidence in a [blocks, slots] grid."""
    empty = torch.zeros(piece.shape, dtype=confidence.dtype, device=confidence.device)
    grid = empty.flatten().scatter(0, piece.grid_indices, confidence).view(piece.shape)
    supervised = (
        torch.zeros_like(empty, dtype=torch.bool).flatten().scatter(0, piece.grid_indices, used).view(piece.shape)
    )
    return slot_weights(objective, grid, supervised).flatten()[piece.grid_indices]
