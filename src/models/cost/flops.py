"""Analytical FLOPs of one optimizer step and of one decoding step. Needs no torch.

Counts matrix products, including attention, at 2 FLOPs per multiply-add, like `torch.utils.flop_counter`.
Memory is in `models.cost.memory`. Shapes as in `data.batch`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from models.cost.sizes import ATTENTION_TUNING, Sizes


def step_flops(
    sizes: Sizes,
    stage: str,
    *,
    rows: int,
    max_seq_len: int,
    num_anchors: int,
    slot0_loss: bool = False,
    teacher: bool = False,
    supervised: int | None = None,
    clean_pairs: float | None = None,
    mask_pairs: float | None = None,
    twice: "Twice | None" = None,
) -> dict[str, float]:
    """Return the minimum FLOPs of one optimizer step on one rank, by part: a lower bound on its time.

    Args:
        stage: `attention_tuning` or `bonus_calibration`.
        rows: rows per step on this rank.
        teacher: whether the objective uses the target's distribution.
        supervised: labeled slots over all rows; None: all trainable slots.
        clean_pairs, mask_pairs: query-key pairs computed by attention in a layer without a window, over all rows;
            None: the pairs allowed by the masks if each row is a single document with evenly spread anchors.
        twice: parts recomputed to save memory; None: no recomputation, as for the lower bound.

    Returns:
        `target pass`, `mask pass`, `head and loss`, `calibrator` (with the chain; 0 in stage 1); their sum is the step.
    """
    tuning, layers_train = stage == ATTENTION_TUNING, sizes.trains_layers(stage)
    twice = twice or Twice()
    clean, blocks = rows * max_seq_len, rows * num_anchors
    masks = blocks * sizes.block_size
    if supervised is None:
        supervised = blocks * (sizes.block_size - (0 if slot0_loss else 1))
    if clean_pairs is None:
        clean_pairs = rows * max_seq_len * (max_seq_len + 1) / 2
    if mask_pairs is None:
        mask_pairs = masks * (max_seq_len / 2 + sizes.block_size)
    last = sizes.all_layers[-1:]
    target = _layers_flops(sizes, sizes.all_layers, clean, clean_pairs)
    if tuning and not teacher:
        # The last layer only needs keys and values, but transformers' modules compute the queries first.
        target -= _layers_flops(sizes, last, clean, clean_pairs)
        target += clean * 2 * sizes.hidden * (sizes.queries + 2 * sizes.keys)
    mask = forward = _layers_flops(sizes, sizes.drafting, masks, mask_pairs)
    if sizes.bonus_slot:  # backward: weight gradient
        mask += blocks * 2 * sizes.hidden**2 * (2 if layers_train else 1)
    if layers_train:
        # Backward: input gradient of each linear layer, plus weight gradient of the projections. Attention has
        # gradients for both factors of its two products; fused kernels also recompute the scores.
        attention = (2.5 if twice.scores else 2) * _attention_flops(sizes, sizes.drafting, masks, mask_pairs)
        updates = sizes.draft_layers * (sizes.updates or 0)  # forward, input gradient, weight gradient
        tuned = 3 * updates or sizes.draft_layers * sizes.attention_weights
        mask += 2 * masks * (sizes.weights(sizes.drafting) + tuned) + attention
        if twice.layers:  # recomputed up to the last saved tensor, excluding a dense FFN's output projection
            mask += forward - masks * 2 * sizes.hidden * sizes.intermediate * _dense(sizes, sizes.drafting)
    head = 2 * sizes.embedding_parameters
    forwards = 2 if twice.logits else 1
    # If layers are trained, the gradient propagates to the hidden states; the head itself is frozen.
    forwards = 1 if tuning else forwards
    loss = supervised * head * (forwards * (2 if teacher else 1) + (1 if layers_train else 0))
    calibrator = 0.0
    if not tuning:
        for rank in sizes.corrections:
            first, second = _correction_flops(sizes, rank)
            # Backward: W1's weight gradient, plus its input gradient if layers are trained; both for W2.
            backward = (2 if layers_train else 1) * first + 2 * second
            calibrator += supervised * (forwards * (first + second) + backward)
        target += blocks * head  # the bonus tokens
    return {"target pass": target, "mask pass": mask, "head and loss": loss, "calibrator": calibrator}


def _correction_flops(sizes: Sizes, rank: int) -> tuple[int, int]:
    """Return the FLOPs of W1 and of W2 for one slot."""
    return 2 * 2 * sizes.hidden * rank, 2 * rank * sizes.vocabulary


def _layers_flops(sizes: Sizes, layers: Iterable[int], tokens: float, pairs: float) -> float:
    """Return the forward FLOPs of layers; `pairs` is the number of query-key pairs in a layer without a window."""
    return 2 * tokens * sizes.weights(layers) + _attention_flops(sizes, layers, tokens, pairs)


def _attention_flops(sizes: Sizes, layers: Iterable[int], tokens: float, pairs: float) -> float:
    """Return the forward FLOPs of attention scores and weighted values, limited to the windows."""
    return 2 * 2 * sizes.queries * sum(_seen(pairs, tokens, sizes.windows[layer]) for layer in layers)


def _seen(pairs: float, tokens: float, window: int | None) -> float:
    """Estimate the query-key pairs within a window; an upper bound that assumes a full window for every query."""
    return pairs if window is None else min(pairs, tokens * window)


def _dense(sizes: Sizes, layers: Iterable[int]) -> int:
    """Count the layers without experts."""
    return sum(not sizes.sparse[layer] for layer in layers)


@dataclass(frozen=True)
class Twice:
    """Parts of a step that are recomputed in the backward pass to save memory."""

    scores: bool = False  # attention scores
    layers: bool = False  # draft layers: `runtime.activation_checkpointing`
    logits: bool = False  # in stage 2 with more than one chunk


def decoding_flops(sizes: Sizes, *, context: float, candidates: float, blocks: float) -> dict[str, float]:
    """Return the minimum FLOPs of one decoding step for one row, by part.

    Args:
        context: tokens in the cache.
        candidates: C, tokens scored by the target, including the bonus token.
        blocks: blocks run through the draft layers: 0 without a drafter, 1 in sequential mode, C in parallel mode. All
            but one are redundant.

    Returns:
        `target`, `draft`, `redundant blocks`, `head` (of candidates and of one block), `calibrator` (with the chain).
    """
    slots = sizes.block_size
    block = _layers_flops(sizes, sizes.drafting, slots, slots * (context + slots))
    if sizes.bonus_slot and blocks == 1:  # sequential mode
        block += 2 * sizes.hidden**2
    drafted = slots - 1 if blocks else 0
    return {
        "target": _layers_flops(sizes, sizes.all_layers, candidates, candidates * (context + candidates / 2)),
        "draft": min(blocks, 1) * block,
        "redundant blocks": max(0, blocks - 1) * block,
        "head": (candidates + drafted) * 2 * sizes.embedding_parameters,
        "calibrator": drafted * sum(sum(_correction_flops(sizes, rank)) for rank in sizes.corrections),
    }


def block_flops(sizes: Sizes, *, context: float) -> float:
    """Return the FLOPs of drafting one block for one row in sequential mode: layers, head, calibrator, chain."""
    with_block = decoding_flops(sizes, context=context, candidates=0, blocks=1)
    return sum(with_block.values())
