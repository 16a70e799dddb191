"""Memory of one rank in a training step, by phase and part, from the sizes alone. Needs no torch.

Counted are the tensors that are alive at the fullest moment of each phase, as `models.draft`, `models.objectives` and
transformers' layers make them; docs/preflight.md compares the sums with measured peaks. All results are in bytes.
Shapes as in `data.batch`.
"""

import math
from dataclasses import dataclass

from models.cost import ATTENTION_TUNING, Sizes

FLOAT32, BFLOAT16, BOOL = 4, 2, 1
LIVE_PARAMETERS = 10**9  # DeepSpeed's stage3_max_live_parameters: so many gathered parameters may be kept
REDUCE_BUCKET = 2 * 10**8  # Lightning's reduce_bucket_size for DeepSpeed: elements

Parts = dict[str, float]
PARTS = ("target weights", "drafter weights", "bfloat16 copies", "gradients", "optimizer", "activations", "logits")
PARTS += ("K/V and masks", "other")


@dataclass(frozen=True)
class Setup:
    """How a stage runs, as far as the memory of one rank depends on it."""

    rows: int  # of one pass
    row_length: int
    num_anchors: int
    chunk: int  # slots whose logits are held at a time
    passes: int = 1  # of one optimizer step
    slot0_loss: bool = False
    weight_bytes: int = FLOAT32  # of one weight of the target
    autocast: bool = False  # bfloat16 arithmetic on float32 weights
    ranks: int = 1
    ddp: bool = False
    zero: int = 0  # DeepSpeed's ZeRO stage; 0: none
    reduce_bucket: int = REDUCE_BUCKET
    multi_tensor: bool = True  # AdamW as on GPUs, all tensors at once; on CPUs, one after the other

    @property
    def clean(self) -> int:
        """Clean tokens of a pass."""
        return self.rows * self.row_length

    def masks(self, sizes: Sizes) -> int:
        """Mask tokens of a pass."""
        return self.rows * self.num_anchors * sizes.block_size

    def keys(self, sizes: Sizes) -> int:
        """Keys that a mask token's attention runs over: its row's clean and mask tokens."""
        return self.row_length + self.num_anchors * sizes.block_size

    def slots(self, sizes: Sizes) -> int:
        """Slots of a pass that may carry a loss."""
        return self.rows * self.num_anchors * (sizes.block_size - (0 if self.slot0_loss else 1))

    @property
    def arithmetic(self) -> int:
        """Bytes of a number in matrix products."""
        return BFLOAT16 if self.autocast else self.weight_bytes


def step_memory(sizes: Sizes, stage: str, setup: Setup) -> dict[str, Parts]:
    """Bytes by phase of a step and by part. The peak is the phase with the greatest sum."""
    phases = {"target pass": _target_pass(sizes, stage, setup), "mask pass": _mask_pass(sizes, stage, setup)}
    phases |= {"loss": _loss(sizes, stage, setup), "loss, backward": _loss_backward(sizes, stage, setup)}
    if stage == ATTENTION_TUNING:
        phases["mask pass, backward"] = _mask_backward(sizes, setup)
    phases["optimizer"] = _optimizer_step(sizes, stage, setup)
    if setup.zero in (1, 2):  # two buckets, one fills while the other is reduced; ZeRO 3 keeps a single one for good
        for name in phases.keys() & {"loss, backward", "mask pass, backward"}:
            phases[name]["other"] = 2 * setup.reduce_bucket * FLOAT32
    held = _held(sizes, stage, setup)
    return {name: {part: held.get(part, 0) + parts.get(part, 0) for part in PARTS} for name, parts in phases.items()}


def peak(phases: dict[str, Parts]) -> tuple[str, float]:
    """The fullest phase, and its bytes."""
    name = max(phases, key=lambda phase: sum(phases[phase].values()))
    return name, sum(phases[name].values())


def _held(sizes: Sizes, stage: str, setup: Setup) -> Parts:
    """What is there in every phase: weights, the optimizer's state, buffers of reductions."""
    target = sizes.target_parameters * setup.weight_bytes
    drafter = sizes.draft_parameters(stage) * FLOAT32
    trained = sizes.trained_parameters(stage) * FLOAT32
    parts = {"target weights": target, "drafter weights": drafter, "optimizer": 2 * trained}  # AdamW: two moments
    if setup.ddp:
        parts["other"] = trained  # gradients are reduced in buckets of their own
    if setup.zero:
        # The moments are sharded; a shard of the weights, flat, is what the optimizer works on.
        parts["optimizer"] = 3 * trained / setup.ranks
    if setup.zero == 3:
        # Each rank keeps its piece. Whole parameters are gathered for use, and kept up to DeepSpeed's limit.
        parts["target weights"] = target / setup.ranks
        parts["drafter weights"] = drafter / setup.ranks
        whole = sizes.target_parameters + sizes.draft_parameters(stage)
        gathered = min(LIVE_PARAMETERS, whole) * setup.weight_bytes
        parts["other"] = gathered + setup.reduce_bucket * FLOAT32
    return parts


def _gradients(sizes: Sizes, stage: str, setup: Setup) -> float:
    """All gradients of the trained parameters, as far as they are this rank's to keep."""
    full = sizes.trained_parameters(stage) * FLOAT32
    return full / setup.ranks if setup.zero >= 2 else full


def _waiting_gradients(sizes: Sizes, stage: str, setup: Setup) -> float:
    """Gradients that are there before a backward pass: of earlier passes. With a single one they have been dropped."""
    return _gradients(sizes, stage, setup) if setup.passes > 1 or setup.zero == 3 else 0


def _target_pass(sizes: Sizes, stage: str, setup: Setup) -> Parts:
    """At the last layer: the K/V of all layers are cached, only the draft layers' are of use later."""
    stream = setup.weight_bytes
    mask = setup.rows * setup.row_length**2
    caches = sizes.layers * _clean_kv(sizes, setup)
    attention = _attention_workspace(sizes, setup, setup.clean, setup.clean, mask, stream)
    ffn = _ffn_workspace(sizes, setup, setup.clean, stream)
    embeddings = setup.clean * sizes.hidden * setup.weight_bytes  # transformers' loop over the layers keeps them
    # The target's own words at the anchors are an excerpt of its logits.
    bonus = setup.rows * setup.num_anchors * sizes.vocabulary * setup.arithmetic if stage != ATTENTION_TUNING else 0
    return {
        "gradients": _gradients(sizes, stage, setup),  # of the step before: dropped only before the backward pass
        "activations": max(embeddings + attention, embeddings + ffn, bonus),
        "K/V and masks": caches + mask * BOOL,
    }


def _mask_pass(sizes: Sizes, stage: str, setup: Setup) -> Parts:
    """At the last draft layer. In stage 1 all layers' activations are kept for the backward pass."""
    masks, keys = setup.masks(sizes), setup.rows * setup.keys(sizes)
    mask = masks * setup.keys(sizes)
    context = sizes.draft_layers * _clean_kv(sizes, setup) + setup.clean * sizes.hidden * setup.weight_bytes
    joined = keys * sizes.keys * (FLOAT32 + setup.weight_bytes)  # context and blocks
    attention = joined + _attention_workspace(sizes, setup, masks, keys, mask, FLOAT32)
    ffn = _ffn_workspace(sizes, setup, masks, FLOAT32)
    parts = {"gradients": _gradients(sizes, stage, setup), "K/V and masks": context + mask * BOOL}
    if stage == ATTENTION_TUNING:
        saved = _saved(sizes, setup)
        layer = saved["activations"] / sizes.draft_layers
        saved["K/V and masks"] += parts["K/V and masks"]
        # The last layer has saved at most what it will: its workspace counts beyond that.
        saved["activations"] += max(attention, ffn) - min(layer, max(attention, ffn))
        return parts | saved
    return parts | {"activations": max(attention, ffn)}


def _loss(sizes: Sizes, stage: str, setup: Setup) -> Parts:
    """One chunk's forward pass. The last step's gradients are still there."""
    # Logits in float32 and their log-softmax; or, in stage 2, before that: logits, correction and their sum.
    words = 2 * FLOAT32 if stage == ATTENTION_TUNING else max(2 * FLOAT32, 3 * setup.arithmetic)
    parts = _kept_for_loss(sizes, stage, setup, words)
    parts["gradients"] = _gradients(sizes, stage, setup)
    # Hidden states of all slots, and of the supervised ones.
    parts["activations"] += (setup.masks(sizes) + setup.slots(sizes)) * sizes.hidden * FLOAT32
    return parts


def _loss_backward(sizes: Sizes, stage: str, setup: Setup) -> Parts:
    """One chunk's backward pass, before any activation of the draft layers is released."""
    # The log-softmax, the gradient of it, the gradient of the logits.
    parts = _kept_for_loss(sizes, stage, setup, 3 * FLOAT32)
    parts["gradients"] = _waiting_gradients(sizes, stage, setup)
    if setup.slots(sizes) > setup.chunk:
        # The inputs of all chunks; in stage 1 also their gradient, and that of one chunk padded with zeros to it.
        copies = 3 if stage == ATTENTION_TUNING else 1
        parts["activations"] += copies * setup.slots(sizes) * sizes.hidden * FLOAT32
    return parts


def _kept_for_loss(sizes: Sizes, stage: str, setup: Setup, words: int) -> Parts:
    """What a chunk's forward and backward pass have in common. `words`: bytes for a slot and a word of V."""
    slots = setup.slots(sizes)
    chunk = math.ceil(slots / math.ceil(slots / setup.chunk))  # slots are split evenly
    logits = {"logits": chunk * sizes.vocabulary * words}
    if stage == ATTENTION_TUNING:
        parts = _saved(sizes, setup)
        if setup.autocast and setup.weight_bytes == FLOAT32:
            parts["bfloat16 copies"] += BFLOAT16 * sizes.embedding_parameters  # the head's
        return parts | logits
    # The calibrator's input, and its hidden units before and after SiLU.
    inputs = chunk * (2 * sizes.hidden + 2 * sizes.rank) * setup.arithmetic
    copies = BFLOAT16 * sizes.calibrator_parameters if setup.autocast else 0
    return logits | {"activations": inputs, "bfloat16 copies": copies}


def _mask_backward(sizes: Sizes, setup: Setup) -> Parts:
    """In the last draft layer, the first to be left: nothing below it is released, no gradient is finished."""
    masks, keys = setup.masks(sizes), setup.rows * setup.keys(sizes)
    parts = _saved(sizes, setup)
    ffn_saved = 3 * masks * sizes.intermediate * setup.arithmetic
    # Of the FFN: the gradients of gate, up and their product. Once it is released, of attention: those of queries, keys
    # and values, and the keys' once more in float32.
    in_ffn = 3 * masks * sizes.intermediate * setup.arithmetic
    cast = FLOAT32 if setup.autocast else 0
    in_attention = sizes.queries * (masks * setup.arithmetic + keys * (2 * setup.arithmetic + cast)) - ffn_saved
    stream = 2 * masks * sizes.hidden * FLOAT32  # the gradient of the residual stream, and of what is added to it
    return parts | {
        "gradients": _waiting_gradients(sizes, ATTENTION_TUNING, setup),
        "activations": parts["activations"] + stream + max(in_ffn, in_attention),
    }


def _optimizer_step(sizes: Sizes, stage: str, setup: Setup) -> Parts:
    """AdamW's denominator, of all tensors at once or of the largest; under ZeRO 1 and 2 also flat gradients."""
    trained = sizes.trained_parameters(stage) * FLOAT32
    if setup.zero:
        flat = 0 if setup.zero == 3 else trained / setup.ranks
        return {"gradients": _gradients(sizes, stage, setup) + flat, "optimizer": trained / setup.ranks}
    largest = sizes.hidden * sizes.queries if stage == ATTENTION_TUNING else sizes.vocabulary * sizes.rank
    temporary = trained if setup.multi_tensor else 2 * largest * FLOAT32
    return {"gradients": _gradients(sizes, stage, setup), "optimizer": temporary}


def _clean_kv(sizes: Sizes, setup: Setup) -> float:
    """K/V of the clean tokens in one layer. The cache takes values in the keys' dtype, which is that of their norm."""
    return setup.clean * 2 * sizes.keys * (setup.weight_bytes if sizes.head_norms else setup.arithmetic)


def _saved(sizes: Sizes, setup: Setup) -> Parts:
    """What the draft layers keep for the backward pass. The mask tokens' residual stream is float32 as their embedding
    is; matrix products see copies of it in the dtype of the arithmetic."""
    masks, arithmetic = setup.masks(sizes), setup.arithmetic
    norms = FLOAT32 if not setup.autocast else FLOAT32 + arithmetic  # float32 before the norm; copy for its weight
    normed = (
        3 * arithmetic if setup.autocast else FLOAT32
    )  # a copy for each of q, k and v; without autocast one for all
    # Without autocast, what the head norms keep for their weight is another tensor than what they keep for their input.
    head = norms if setup.autocast else 2 * FLOAT32
    head = head if sizes.head_norms else 0
    token = (
        2 * FLOAT32 * sizes.hidden  # inputs of the two norms
        + normed * sizes.hidden
        + head * (sizes.queries + sizes.keys)
        + 2 * arithmetic * sizes.queries  # rotated queries, and the attention's output
        + FLOAT32 * sizes.heads  # log-sum-exp of the scores
        + 3 * arithmetic * sizes.intermediate  # gate, its activation, up
    )
    # Keys and values of context and blocks, repeated for every query head; the mask as numbers, for each layer anew.
    keys = 2 * arithmetic * sizes.queries * setup.rows * setup.keys(sizes)
    mask = arithmetic * masks * setup.keys(sizes)
    copies = 0
    if setup.autocast:  # of the projectors, and of a frozen FFN unless it is bfloat16 already
        copies = BFLOAT16 * (sizes.attention_weights + (sizes.ffn_weights if setup.weight_bytes == FLOAT32 else 0))
    return {
        "activations": sizes.draft_layers * masks * token,
        "K/V and masks": sizes.draft_layers * (keys + mask),
        "bfloat16 copies": sizes.draft_layers * copies,
    }


def _attention_workspace(sizes: Sizes, setup: Setup, queries: int, keys: int, pairs: int, stream: int) -> float:
    """One layer's attention without gradient, in the moment of the attention itself.

    Args:
        queries, keys: tokens. pairs: of a query and a key in the same row. stream: bytes of the residual stream.
    """
    arithmetic = setup.arithmetic

    def with_copy(number: int) -> int:
        """Bytes of a number and of its copy in the dtype of the arithmetic, if that is another one."""
        return number + (arithmetic if number != arithmetic else 0)

    token = 2 * stream * sizes.hidden + sizes.queries * (with_copy(stream) + arithmetic)
    # Repeated for every query head. Keys leave their norm in the stream's dtype, values are as the cache has them.
    key = sizes.queries * (with_copy(stream) + with_copy(setup.weight_bytes))
    return queries * token + keys * key + pairs * arithmetic


def _ffn_workspace(sizes: Sizes, setup: Setup, tokens: int, stream: int) -> float:
    """One layer's FFN without gradient: the layer's input, the residual, its norm, and gate, up and their product."""
    return tokens * (3 * stream * sizes.hidden + 3 * setup.arithmetic * sizes.intermediate)
