"""Chunked computation of the objective over the blocks in a batch, which bounds the memory for logits."""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from data.batch import Batch
from models.attention.compiled import compiled as compile_function
from models.loss.objectives import Objective, Piece, piece_loss

LogitsFunction = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
Sums = tuple[Tensor, Tensor, Tensor]  # loss sum, weight sum, [n] whether the top-1 token is the label


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
    head_trainable: bool = False,
    compiled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the objective over all blocks, materializing the logits of one chunk at a time in forward and backward.

    Args:
        logits_of: (hidden [n, H], bonus [n] or None, previous [n] or None) -> logits [n, V], independently per slot.
        hidden: [R, A, B, H] draft hidden states.
        chunk: maximum number of slots whose logits are held at once; a chunk has at least one block.
        slot0_loss: whether to train slot 0, whose prediction is replaced by the bonus token in decoding.
        labels: [R, A, B] overrides the batch's labels, e.g. to mask entire blocks.
        bonus: [R, A] bonus tokens, or None.
        previous: [R, A, B] the token before each slot, or None.
        target_hidden: [R, T, H] target hidden states, required if the objective uses the target's distribution.
        head_trainable: whether `logits_of` has trainable parameters.
        compiled: whether to use the compiled loss.

    Returns:
        Sum of weighted losses, sum of weights (detached), and correct [R, A, B-1]: whether the top-1 token of each
        drafted slot is its label. The mean over a global batch is the total loss divided by the total weight.
    """
    labels = batch.labels if labels is None else labels
    size, first = labels.shape[-1], 0 if slot0_loss else 1
    pieces = split_into_pieces(batch, labels, first=first, chunk=chunk)
    head = _LossHead(logits_of, objective, compiled, _flat(bonus), _flat(previous), size)
    if objective.needs_target:
        assert target_hidden is not None
        head.teacher, head.before = target_hidden.flatten(0, 1), slots_before(batch, size)
    if hidden.requires_grad and not head_trainable:
        loss, weight, hits = _LossOfHidden.apply(hidden, pieces, head)
    else:
        states = hidden.flatten(0, -2)
        results = [_loss_of_head(head, states[piece.slots], piece, len(pieces) > 1) for piece in pieces]
        loss, weight = (torch.stack([result[i] for result in results]).sum() for i in (0, 1))
        hits = torch.cat([result[2] for result in results])
    correct = torch.zeros(labels.numel(), dtype=torch.bool, device=labels.device)
    correct = correct.scatter(0, torch.cat([piece.slots for piece in pieces]), hits)
    return loss, weight, correct.view(labels.shape)[..., 1:]


def split_into_pieces(batch: Batch, labels: Tensor, *, first: int, chunk: int) -> list[Piece]:
    """Split the labeled slots from slot `first` on into pieces of at most `chunk` slots, but at least one block.

    The number of pieces does not depend on the labels: under ZeRO 3, each call to the head is a collective gather, so
    ranks that make different numbers of calls would deadlock or gather the wrong layer's weights.
    """
    slots, before = batch.labelled_slots(first)
    values, size = labels.flatten()[slots], labels.shape[-1]
    blocks, at_once = len(batch.lengths), max(1, chunk // (size - first))
    pieces = []
    for start in range(0, blocks, at_once):
        stop = min(start + at_once, blocks)
        part = slice(before[start], before[stop])
        piece_slots = slots[part]
        grid_indices = (piece_slots // size - start) * (size - first) + piece_slots % size - first
        pieces.append(Piece(piece_slots, values[part], grid_indices, (stop - start, size - first)))
    return pieces


def slots_before(batch: Batch, block_size: int) -> Tensor:
    """Return, for each slot [R*A*B], the index of the preceding clean token among all R*T tokens."""
    length = batch.input_ids.shape[1]
    slots = torch.arange(block_size, device=batch.anchors.device)
    at = (batch.anchors[..., None] + slots - 1).clamp(0, length - 1)  # [R, A, B]; slots past the end have no label
    rows = torch.arange(len(batch.input_ids), device=at.device) * length
    return (at + rows[:, None, None]).flatten()


def _flat(tokens: Tensor | None) -> Tensor | None:
    return None if tokens is None else tokens.flatten()


@dataclass
class _LossHead:
    """Computes the logits and the loss of a piece from its hidden states."""

    logits_of: LogitsFunction
    objective: Objective
    compiled: bool
    bonus: Tensor | None  # [R*A]
    previous: Tensor | None  # [R*A*B]
    block_size: int
    teacher: Tensor | None = None  # [R*T, H]
    before: Tensor | None = None  # [R*A*B] indices into `teacher`

    def logits(self, part: Tensor, piece: Piece) -> Tensor:
        """Compute the draft logits [n, V] of a piece."""
        bonus = None if self.bonus is None else self.bonus[piece.slots // self.block_size]
        return self.logits_of(part, bonus, None if self.previous is None else self.previous[piece.slots])

    @torch.no_grad()
    def loss(self, logits: Tensor, piece: Piece, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return the results of `piece_loss`, with the gradient in the dtype of `logits`. May overwrite `logits`."""
        teacher, wide = None, torch.promote_types(logits.dtype, torch.float32)
        if self.before is not None and self.teacher is not None:
            teacher = self.logits_of(self.teacher[self.before[piece.slots]], None, None)
        with nullcontext() if logits.is_meta else torch.autocast(logits.device.type, enabled=False):
            if self.compiled:
                return _compiled_piece_loss()(logits.detach(), teacher, piece, self.objective, with_gradient)
            teacher = None if teacher is None else teacher.to(wide)
            wide_logits = logits.detach().to(wide)
            loss, weight, correct, gradient = piece_loss(wide_logits, teacher, piece, self.objective, with_gradient)
            del wide_logits
        if gradient is not None and gradient.dtype != logits.dtype:
            gradient = logits.detach().copy_(gradient)
        return loss, weight, correct, gradient


class _LossOfHidden(torch.autograd.Function):
    """Loss for stage 1, summed over all pieces. The forward pass also computes the gradient.

    This avoids recomputing the logits in the backward pass. The head must be frozen: only the gradient with respect to
    the hidden states is computed.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, pieces: list[Piece], head: _LossHead) -> Sums:
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


def _with_gradient(head: _LossHead, flat: Tensor, piece: Piece, gradient: Tensor) -> Sums:
    """Compute the loss of one piece and write its gradient with respect to the hidden states into `gradient`.

    This is a separate function so that the logits are freed on return.
    """
    with torch.enable_grad():
        part = flat[piece.slots].requires_grad_()
        logits = head.logits(part, piece)
    loss, weight, correct, of_logits = head.loss(logits, piece, with_gradient=True)
    gradient[piece.slots] = torch.autograd.grad(logits, part, of_logits)[0]
    return loss, weight, correct


def _loss_of_head(head: _LossHead, part: Tensor, piece: Piece, recompute: bool) -> Sums:
    """Compute the loss of one piece through autograd, for stage 2 and validation.

    ZeRO requires that trained parameters get their gradients from autograd. With `recompute`, the logits are
    recomputed in the backward pass; otherwise, autograd would keep those of every piece.
    """

    def loss() -> Sums:
        return _LossOfLogits.apply(head.logits(part, piece), piece, head)

    return checkpoint(loss, use_reentrant=False) if recompute and torch.is_grad_enabled() else loss()


class _LossOfLogits(torch.autograd.Function):
    """Autograd function for the loss of a piece. Backward can run only once, since it overwrites the saved gradient."""

    @staticmethod
    def forward(ctx, logits: Tensor, piece: Piece, head: _LossHead) -> Sums:
        loss, weight, correct, gradient = head.loss(logits, piece, ctx.needs_input_grad[0])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(weight, correct)
        return loss, weight, correct

    @staticmethod
    def backward(ctx, gradient: Tensor, *_) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0].mul_(gradient), None, None


def _loss_from_head(
    logits: Tensor, teacher: Tensor | None, piece: Piece, objective: Objective, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Compute `piece_loss` under torch.compile. Copies the inputs within the graph, so that they are not held twice."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    wide_logits = logits.to(wide, copy=True)
    teacher = None if teacher is None else teacher.to(wide, copy=True)
    loss, weight, correct, gradient = piece_loss(wide_logits, teacher, piece, objective, with_gradient)
    return loss, weight, correct, None if gradient is None else gradient.to(logits.dtype)


@functools.cache
def _compiled_piece_loss() -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Return the compiled loss, which makes a few passes over the logits instead of a dozen.

    Shapes are dynamic, since the number of labeled slots varies.
    """
    return compile_function(_loss_from_head, dynamic=True)
