"""FLOPs of one optimizer step and of one decoding step, from the sizes alone. Needs no torch.

They are those of matrix products, attention's included: 2 per multiply-add, as `torch.utils.flop_counter` counts them.
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
    """FLOPs that one optimizer step on one rank cannot do without, by part: the floor of its time.

    Args:
        stage: `attention_tuning` or `bonus_calibration`.
        rows: of the step on this rank.
        teacher: whether the objective compares with the target's distribution.
        supervised: slots that carry a label, in all rows together; None: all that could.
        clean_pairs, mask_pairs: of a query and a key that attention computes, in all rows together, in a layer without
            a window; None: those that the masks allow, were each row a single document with anchors all over it.
        twice: what is computed a second time to save memory; None: nothing, as the floor is counted.

    Returns:
        `target pass`, `mask pass`, `head and loss`, `calibrator` (0 in stage 1; with the chain); their sum is the step.
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
        # Of the last layer only keys and values are of use; transformers' modules compute the queries before these.
        target -= _layers_flops(sizes, last, clean, clean_pairs)
        target += clean * 2 * sizes.hidden * (sizes.queries + 2 * sizes.keys)
    mask = forward = _layers_flops(sizes, sizes.drafting, masks, mask_pairs)
    if sizes.bonus_slot:  # backward: for its weights
        mask += blocks * 2 * sizes.hidden**2 * (2 if layers_train else 1)
    if layers_train:
        # Backward: each linear map once for its input, the projectors once more for their weights. Attention has a
        # gradient for each of its two products' factors; fused kernels compute the scores again.
        attention = (2.5 if twice.scores else 2) * _attention_flops(sizes, sizes.drafting, masks, mask_pairs)
        updates = sizes.draft_layers * (sizes.updates or 0)  # forward, for their inputs, for their weights
        tuned = 3 * updates or sizes.draft_layers * sizes.attention_weights
        mask += 2 * masks * (sizes.weights(sizes.drafting) + tuned) + attention
        if twice.layers:  # up to the last tensor that was kept, which is not a dense FFN's output
            mask += forward - masks * 2 * sizes.hidden * sizes.intermediate * _dense(sizes, sizes.drafting)
    head = 2 * sizes.embedding_parameters
    forwards = 2 if twice.logits else 1
    # Where layers are trained, the gradient goes down to the hidden state; the head itself is frozen.
    forwards = 1 if tuning else forwards
    loss = supervised * head * (forwards * (2 if teacher else 1) + (1 if layers_train else 0))
    calibrator = 0.0
    if not tuning:
        for rank in sizes.corrections:
            first, second = _correction_flops(sizes, rank)
            # Backward: W1 for its weights, and for its input unless that is frozen; W2 for both.
            backward = (2 if layers_train else 1) * first + 2 * second
            calibrator += supervised * (forwards * (first + second) + backward)
        target += blocks * head  # the bonus tokens
    return {"target pass": target, "mask pass": mask, "head and loss": loss, "calibrator": calibrator}


def _correction_flops(sizes: Sizes, rank: int) -> tuple[int, int]:
    """Of one slot: of W1 and of W2."""
    return 2 * 2 * sizes.hidden * rank, 2 * rank * sizes.vocabulary


def _layers_flops(sizes: Sizes, layers: Iterable[int], tokens: float, pairs: float) -> float:
    """Forward, of tokens that attend to so many keys in all where a layer has no window."""
    return 2 * tokens * sizes.weights(layers) + _attention_flops(sizes, layers, tokens, pairs)


def _attention_flops(sizes: Sizes, layers: Iterable[int], tokens: float, pairs: float) -> float:
    """Forward: scores and weighted values, of keys within the windows."""
    return 2 * 2 * sizes.queries * sum(_seen(pairs, tokens, sizes.windows[layer]) for layer in layers)


def _seen(pairs: float, tokens: float, window: int | None) -> float:
    """Of these pairs, those within a window, as if every query had a full one: some more than there are."""
    return pairs if window is None else min(pairs, tokens * window)


def _dense(sizes: Sizes, layers: Iterable[int]) -> int:
    """How many layers have no experts."""
    return sum(not sizes.sparse[layer] for layer in layers)


@dataclass(frozen=True)
class Twice:
    """What a step computes again in its backward pass, so as not to keep it."""

    scores: bool = False  # of attention
    layers: bool = False  # draft layers: `runtime.activation_checkpointing`
    logits: bool = False  # in stage 2 with more than one chunk


def decoding_flops(sizes: Sizes, *, context: float, candidates: float, blocks: float) -> dict[str, float]:
    """FLOPs of one step of decoding for one row that cannot be done without, by part.

    Args:
        context: tokens in the cache.
        candidates: C, tokens that the target scores, bonus included.
        blocks: that go through the draft layers: 0 without a drafter, 1 in sequential mode, C in parallel mode. All but
            one are redundant.

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
    """FLOPs of drafting one block for one row in sequential mode: layers, head, calibrator, chain."""
    with_block = decoding_flops(sizes, context=context, candidates=0, blocks=1)
    return sum(with_block.values())
