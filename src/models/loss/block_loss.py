"""The objective over the blocks of a batch, without ever holding more logits than a chunk of slots has."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from data.batch import Batch
from models.attention.compiled import compiled as compile_function
from models.loss.objectives import Objective, Piece, piece_loss

LogitsFunction = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
Sums = tuple[Tensor, Tensor, Tensor]  # weighted losses, weights, and [n] whether the most likely token is the label


def block_loss(
    logits_of: LogitsFunction,
    hidden: Tensor,
    batch: Batch,
    *,
    objective: Objective,
    chunk: int,
    slot0_loss: bool = False,
    labels: Tensor | None = None,
    bonus: Tensor | None = None,
    previous: Tensor | None = None,
    target_hidden: Tensor | None = None,
    head_trains: bool = False,
    compiled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The objective over all blocks, holding the logits of a chunk of slots at a time, in the backward pass too.

    Args:
        logits_of: (hidden [n, H], bonus [n] or None, previous [n] or None) -> logits [n, V], slot by slot.
        hidden: [R, A, B, H] of the draft.
        chunk: slots whose logits are held at a time, at least one block's.
        slot0_loss: whether slot 0, which decoding discards for the bonus token, is trained like the drafted slots.
        labels: [R, A, B] in place of the batch's, for labels withdrawn from whole blocks.
        bonus: [R, A] or None.
        previous: [R, A, B] or None.
        target_hidden: [R, T, H] of the target, if the objective needs its distribution.
        head_trains: whether `logits_of` has parameters to be trained.

    Returns:
        sum of weighted losses, sum of weights (detached), and correct [R, A, B-1]: the most likely token of a drafted
        slot is its label. The mean over a global batch is the sum of the first over the sum of the second.
    """
    labels = batch.labels if labels is None else labels
    size, first = labels.shape[-1], 0 if slot0_loss else 1
    pieces = cut(batch, labels, first=first, chunk=chunk)
    flat = [None if tokens is None else tokens.flatten() for tokens in (bonus, previous)]
    head = _Head(logits_of, objective, compiled, *flat, size)
    if objective.needs_target:
        head.teacher, head.before = target_hidden.flatten(0, 1), slots_before(batch, size)
    if hidden.requires_grad and not head_trains:
        loss, weight, hits = _LossOfHidden.apply(hidden, pieces, head)
    else:
        flat = hidden.flatten(0, -2)
        results = [_loss_of_head(head, flat[piece.slots], piece, len(pieces) > 1) for piece in pieces]
        loss, weight = (torch.stack([result[i] for result in results]).sum() for i in (0, 1))
        hits = torch.cat([result[2] for result in results])
    correct = torch.zeros(labels.numel(), dtype=torch.bool, device=labels.device)
    correct = correct.scatter(0, torch.cat([piece.slots for piece in pieces]), hits)
    return loss, weight, correct.view(labels.shape)[..., 1:]


def cut(batch: Batch, labels: Tensor, *, first: int, chunk: int) -> list[Piece]:
    """The labelled slots from `first` on, in pieces of `chunk` slots at most.

    As many pieces whatever is labelled: under ZeRO 3 every call of the head gathers it from all ranks, and a rank that
    calls it more often than the others waits for ever, or takes another layer's weights for it.
    """
    slots, before = batch.labelled_slots(first)
    values, size = labels.flatten()[slots], labels.shape[-1]
    blocks, at_once = len(batch.lengths), max(1, chunk // (size - first))
    pieces = []
    for start in range(0, blocks, at_once):
        stop = min(start + at_once, blocks)
        part = slice(before[start], before[stop])
        own = slots[part]
        places = (own // size - start) * (size - first) + own % size - first
        pieces.append(Piece(own, values[part], places, (stop - start, size - first)))
    return pieces


def slots_before(batch: Batch, block_size: int) -> Tensor:
    """[R*A*B] where in the flat [R*T] clean tokens the target predicts each slot's token: one before it."""
    length = batch.input_ids.shape[1]
    slots = torch.arange(block_size, device=batch.anchors.device)
    at = (batch.anchors[..., None] + slots - 1).clamp(0, length - 1)  # [R, A, B]; beyond the row there are no labels
    rows = torch.arange(len(batch.input_ids), device=at.device) * length
    return (at + rows[:, None, None]).flatten()


@dataclass
class _Head:
    """From hidden states to the loss of a piece."""

    logits_of: LogitsFunction
    objective: Objective
    compiled: bool
    bonus: Tensor | None  # [R*A]
    previous: Tensor | None  # [R*A*B]
    block_size: int
    teacher: Tensor | None = None  # [R*T, H]
    before: Tensor | None = None  # [R*A*B] into the teacher's

    def logits(self, part: Tensor, piece: Piece) -> Tensor:
        """[n, V] of the draft."""
        bonus = None if self.bonus is None else self.bonus[piece.slots // self.block_size]
        return self.logits_of(part, bonus, None if self.previous is None else self.previous[piece.slots])

    @torch.no_grad()
    def loss(self, logits: Tensor, piece: Piece, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """`piece_loss`, with the gradient in the dtype of the logits, which may be overwritten."""
        teacher, wide = None, torch.promote_types(logits.dtype, torch.float32)
        if self.before is not None:
            teacher = self.logits_of(self.teacher[self.before[piece.slots]], None, None)
        with torch.autocast(logits.device.type, enabled=False):
            if self.compiled:
                return _compiled_piece_loss()(logits.detach(), teacher, piece, self.objective, with_gradient)
            teacher = None if teacher is None else teacher.to(wide)
            *sums, gradient = piece_loss(logits.detach().to(wide), teacher, piece, self.objective, with_gradient)
        if gradient is not None and gradient.dtype != logits.dtype:
            gradient = logits.detach().copy_(gradient)
        return *sums, gradient


class _LossOfHidden(torch.autograd.Function):
    """Stage 1: the sum over all pieces, with the gradient of the hidden states computed on the way.

    So no logits are computed twice, as they would be if the backward pass had to ask for them again. The head must be
    frozen: no other gradient is computed.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, pieces: list[Piece], head: _Head) -> Sums:
        flat = hidden.flatten(0, -2)
        gradient = torch.zeros_like(flat)
        results = [_with_gradient(head, flat, piece, gradient) for piece in pieces]
        ctx.save_for_backward(gradient.view(hidden.shape))
        loss, weight = (torch.stack([result[i] for result in results]).sum() for i in (0, 1))
        hits = torch.cat([result[2] for result in results])
        ctx.mark_non_differentiable(weight, hits)
        return loss, weight, hits

    @staticmethod
    def backward(ctx, gradient: Tensor, *_) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0] * gradient, None, None


def _with_gradient(head: _Head, flat: Tensor, piece: Piece, gradient: Tensor) -> Sums:
    """Of one piece; writes its hidden states' into `gradient`. A function, so that no logits outlive it."""
    with torch.enable_grad():
        part = flat[piece.slots].requires_grad_()
        logits = head.logits(part, piece)
    *sums, of_logits = head.loss(logits, piece, with_gradient=True)
    gradient[piece.slots] = torch.autograd.grad(logits, part, of_logits)[0]
    return tuple(sums)


def _loss_of_head(head: _Head, part: Tensor, piece: Piece, again: bool) -> Sums:
    """Stage 2, and validation. `again`: compute the logits anew in the backward pass, or autograd would keep them of
    every piece; the head is trained through autograd, since what trains under ZeRO must."""

    def loss() -> Sums:
        return _LossOfLogits.apply(head.logits(part, piece), piece, head)

    return checkpoint(loss, use_reentrant=False) if again and torch.is_grad_enabled() else loss()


class _LossOfLogits(torch.autograd.Function):
    """The loss of a piece for autograd, once: its backward pass uses up the gradient."""

    @staticmethod
    def forward(ctx, logits: Tensor, piece: Piece, head: _Head) -> Sums:
        *sums, gradient = head.loss(logits, piece, ctx.needs_input_grad[0])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(*sums[1:])
        return tuple(sums)

    @staticmethod
    def backward(ctx, gradient: Tensor, *_) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0].mul_(gradient), None, None


def _loss_from_head(
    logits: Tensor, teacher: Tensor | None, piece: Piece, objective: Objective, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`piece_loss` for the compiler: what it overwrites is made here, or it would be held twice."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    copies = [None if given is None else given.to(wide, copy=True) for given in (logits, teacher)]
    *sums, gradient = piece_loss(*copies, piece, objective, with_gradient)
    return *sums, None if gradient is None else gradient.to(logits.dtype)


@functools.cache
def _compiled_piece_loss() -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Reads and writes the logits a few times instead of a dozen. Dynamic: how many slots are labelled changes."""
    return compile_function(_loss_from_head, dynamic=True)
