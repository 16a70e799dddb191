"""Counts the FLOPs of an optimizer step and of a decoding step by tracing the real modules without data.

Only matrix products, including those in attention, are counted, at 2 FLOPs per multiply-add. The formulas are those of
`torch.utils.flop_counter`, except for attention: PyTorch's formula assumes a dense mask, while this module counts only
the given numbers of query-key pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data.batch import Batch
from models.attention.layers import Execution
from models.cost.trace import AttentionCall, Trace, full_batch, meta_target, traceable
from models.draft import DraftModel
from models.target import target_pass

WITHOUT_MASKS = Execution("dense")  # on the meta device, masks have no data


def traced_step(
    trace: Trace, loss: Callable[[Batch], Any], draft: DraftModel, batch: Batch, *, autocast: bool = False
) -> None:
    """Run the forward and backward passes of a micro-batch in a `Trace`.

    The phases of the trace are `target pass`, `mask pass`, `loss`, `backward of the loss` and `backward`.

    Args:
        loss: a function that returns the loss sum as its first output.
        draft: the drafter that `loss` runs. The hooks added to it are not removed.

    Raises:
        ValueError: the target's layers cannot be traced.
    """

    def enter(phase: str) -> Callable[..., None]:
        return lambda *_: setattr(trace, "phase", phase)

    def after_blocks(_: nn.Module, __: Any, hidden: Tensor) -> None:
        trace.phase = "loss"
        if hidden.requires_grad:
            hidden.register_hook(enter("backward"))

    draft.register_forward_pre_hook(enter("mask pass"))
    draft.register_forward_hook(after_blocks)
    with traceable(draft.target), trace:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            total = loss(batch)[0]
        trace.phase = "backward of the loss"
        total.backward()


def step_flops(
    loss: Callable[[Batch], Any],
    draft: DraftModel,
    *,
    rows: int,
    max_seq_len: int,
    num_anchors: int,
    labeled: float = 1,
    clean_pairs: float | None = None,
    mask_pairs: float | None = None,
) -> dict[str, float]:
    """Return the FLOPs of one optimizer step on one rank, by part.

    If `loss` recomputes nothing, these are the minimum FLOPs of the step.

    Args:
        loss: the loss function of a training stage. It is called with a batch in which all slots are labeled.
        draft: the drafter that `loss` runs, on the meta device.
        rows: rows per step on this rank.
        labeled: fraction of the trainable slots that have a label.
        clean_pairs, mask_pairs: query-key pairs computed by attention in a layer without a window, over all rows;
            None: the pairs allowed by the masks if each row is a single document with evenly spread anchors.

    Returns:
        Dict with keys `target pass`, `mask pass`, `head and loss` and `calibrator` (includes the chain; 0 in stage 1),
        whose values add up to the FLOPs of the whole step.
    """
    masks = rows * num_anchors * draft.block_size
    if clean_pairs is None:
        clean_pairs = rows * max_seq_len * (max_seq_len + 1) / 2
    if mask_pairs is None:
        mask_pairs = masks * (max_seq_len / 2 + draft.block_size)
    trace = Trace(head=draft.target.get_output_embeddings().weight, clean_pairs=clean_pairs, mask_pairs=mask_pairs)
    traced_step(
        trace, loss, draft, full_batch(rows, max_seq_len, num_anchors, draft.block_size).to(torch.device("meta"))
    )
    return {
        "target pass": trace.flops["target pass"],
        "mask pass": trace.flops["mask pass"] + trace.flops["backward"],
        "head and loss": labeled * trace.flops["head"],
        "calibrator": labeled * (trace.flops["loss"] + trace.flops["backward of the loss"]),
    }


@dataclass(frozen=True)
class DecodingFlops:
    """FLOPs of decoding with a drafter, per token, slot or block. The methods combine them into totals per step."""

    block_size: int
    token: float  # the target's layers, for one token
    block: float  # the draft layers, for one block
    head: float  # the LM head, for one token or slot
    corrections: float  # calibrator and chain, for one slot
    bonus_slot: float  # the bonus slot's projection, for one block in sequential mode
    attention: tuple[AttentionCall, ...]

    @classmethod
    def of(cls, draft: DraftModel) -> "DecodingFlops":
        """Count the FLOPs for a drafter and its target, which may be on any device.

        Raises:
            ValueError: the target's layers cannot be traced.
        """
        target = meta_target(draft.target.config, torch.float32)
        with torch.device("meta"):
            twin = DraftModel(target, draft.config)
        tokens = draft.block_size + 1
        batch, trace = full_batch(1, tokens, 1, draft.block_size).to(torch.device("meta")), Trace()
        with traceable(target), torch.no_grad(), trace:
            context = target_pass(target, batch, twin.split_layer, execution=WITHOUT_MASKS).context
            trace.phase = "mask pass"
            twin.forward_batch(context, batch, WITHOUT_MASKS)
        return cls(
            draft.block_size,
            token=trace.flops["target pass"] / tokens,
            block=trace.flops["mask pass"],
            head=_linear(target.get_output_embeddings()),
            corrections=_linear(draft.anchor_bias_mlp, draft.chain_mlp),
            bonus_slot=_linear(draft.bonus_slot),
            attention=tuple(trace.attention),
        )

    def step(self, *, context: float, candidates: float, blocks: float) -> dict[str, float]:
        """Return the minimum FLOPs of one decoding step for one row, by part.

        Args:
            context: number of tokens in the cache.
            candidates: C, the number of tokens scored by the target, including the bonus token.
            blocks: number of blocks run through the draft layers: 0 without a drafter, 1 in sequential mode, C in
                parallel mode. All but one are redundant.

        Returns:
            Dict with keys `target`, `draft`, `redundant blocks`, `head` (for the candidates plus one block) and
            `calibrator` (includes the chain).
        """
        slots = self.block_size
        block = self.block + self._attention(True, slots, context + slots) + self.bonus_slot * (blocks == 1)
        drafted = slots - 1 if blocks else 0
        return {
            "target": candidates * self.token + self._attention(False, candidates, context + candidates / 2),
            "draft": min(blocks, 1) * block,
            "redundant blocks": max(0, blocks - 1) * block,
            "head": (candidates + drafted) * self.head,
            "calibrator": drafted * self.corrections,
        }

    def drafting(self, *, context: float) -> float:
        """Return the FLOPs of drafting one block for one row in sequential mode: layers, head, calibrator, chain."""
        return sum(self.step(context=context, candidates=0, blocks=1).values())

    def _attention(self, of_blocks: bool, queries: float, keys: float) -> float:
        calls = (call for call in self.attention if call.of_blocks == of_blocks)
        return sum(call.flops(queries * keys, queries) for call in calls)


def _linear(*modules: nn.Module | None) -> float:
    """Return the FLOPs of the linear layers in the given modules, for one token. None counts as 0."""
    return sum(2 * p.numel() for module in modules if module is not None for p in module.parameters() if p.ndim == 2)
