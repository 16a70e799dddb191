"""Analytical memory of one rank in a training step, by phase and part. Needs no torch.

Counts the tensors alive at the peak of each phase, as allocated by `models.draft`, `models.attention.packed`,
`models.loss.block_loss` and transformers' layers. docs/results/preflight.md compares the sums with peaks measured on
CPUs; FlexAttention's memory is derived from its code. All results are in bytes. Shapes as in `data.batch`.
"""

from dataclasses import replace

from models.cost.activation_memory import (
    BFLOAT16,
    BOOL,
    FLOAT32,
    Parts,
    Setup,
    clean_kv,
    ffn,
    ffn_gradients,
    saved,
    saved_by_a_layer,
    views,
)
from models.cost.sizes import ATTENTION_TUNING, Sizes

LIVE_PARAMETERS = 10**9  # DeepSpeed's stage3_max_live_parameters: limit of gathered parameters
PARTS = ("target weights", "drafter weights", "bfloat16 copies", "gradients", "optimizer", "activations", "logits")
PARTS += ("K/V and masks", "other")


def step_memory(sizes: Sizes, stage: str, setup: Setup) -> dict[str, Parts]:
    """Return the bytes of a step by phase and part. The peak is the phase with the largest sum."""
    phases = {"target pass": _target_pass(sizes, stage, setup), "mask pass": _mask_pass(sizes, stage, setup)}
    if stage == ATTENTION_TUNING:
        phases |= {"loss": _tuning_loss(sizes, setup), "backward": _tuning_backward(sizes, stage, setup)}
    elif sizes.joint:
        phases |= _joint(sizes, stage, setup)
    else:
        phases |= {"loss": _calibrator_loss(sizes, stage, setup), "backward": _calibrator_backward(sizes, stage, setup)}
    phases["optimizer"] = _optimizer_step(sizes, stage, setup)
    if setup.zero in (1, 2):  # two buckets: one fills while the other is reduced; ZeRO 3 holds one permanently
        phases["backward"]["other"] = 2 * setup.reduce_bucket * FLOAT32
    return {name: _beside_held(sizes, stage, setup, parts) for name, parts in phases.items()}


def decoding_memory(
    sizes: Sizes, stage: str, setup: Setup, *, prompts: int, prompt_length: int, new_tokens: int
) -> Parts:
    """Return the peak bytes by part of decoding during training: in a layer's FFN during prefill; after prefill, when
    K/V move layer by layer from the packed pass to the cache; or at the draft logits.

    Args:
        prompts, new_tokens: as in `train.loop.validation_decoding`, for one batch on this rank.
        prompt_length: tokens per prompt.
    """
    capacity = prompt_length + new_tokens + 2 * sizes.block_size  # as in `models.decoding`, in sequential mode
    token = 2 * sizes.layers * sizes.keys * setup.weight_bytes
    packed, cache = prompts * prompt_length * token, prompts * capacity * token
    exact = replace(setup, autocast=False)  # decoding computes in the weights' dtype
    layer = max(ffn(sizes, exact, prompts * prompt_length, n) for n in sizes.all_layers)
    stream = prompts * prompt_length * sizes.hidden * setup.weight_bytes
    logits = prompts * sizes.block_size * sizes.vocabulary * (setup.weight_bytes + 2 * FLOAT32)
    fullest = max(
        {"K/V and masks": cache, "logits": logits},
        {"K/V and masks": max(packed + cache / sizes.layers, packed / sizes.layers + cache), "activations": stream},
        {"K/V and masks": packed, "activations": layer},
        key=lambda parts: sum(parts.values()),
    )
    copy = sizes.draft_parameters(stage) * setup.weight_bytes  # the drafter in the target's dtype, as it is exported
    parts = {"gradients": _gradients(sizes, stage, setup), "drafter weights": copy}
    return _beside_held(sizes, stage, setup, parts | fullest)


def _beside_held(sizes: Sizes, stage: str, setup: Setup, parts: Parts) -> Parts:
    """Add the memory held in every phase."""
    held = _held(sizes, stage, setup)
    return {part: held.get(part, 0) + parts.get(part, 0) for part in PARTS}


def peak(phases: dict[str, Parts]) -> tuple[str, float]:
    """Return the phase with the most memory, and its bytes."""
    name = max(phases, key=lambda phase: sum(phases[phase].values()))
    return name, sum(phases[name].values())


def _held(sizes: Sizes, stage: str, setup: Setup) -> Parts:
    """Return the memory held in every phase: weights, optimizer state, reduction buffers."""
    target = sizes.target_parameters * setup.weight_bytes
    drafter = sizes.held_parameters(stage) * FLOAT32
    trained = sizes.trained_parameters(stage) * FLOAT32
    parts = {"target weights": target, "drafter weights": drafter, "optimizer": 2 * trained}  # AdamW: two moments
    if setup.ddp:
        parts["other"] = trained  # gradients are reduced in separate buckets
    if setup.zero:
        # Moments are sharded; the optimizer updates a flat shard of the weights.
        parts["optimizer"] = 3 * trained / setup.ranks
    if setup.zero == 3:
        # Each rank stores its shard. Full parameters are gathered for use, and kept up to DeepSpeed's limit.
        parts["target weights"] = target / setup.ranks
        parts["drafter weights"] = drafter / setup.ranks
        whole = sizes.target_parameters + sizes.held_parameters(stage)
        gathered = min(LIVE_PARAMETERS, whole) * setup.weight_bytes
        parts["other"] = gathered + setup.reduce_bucket * FLOAT32
    return parts


def _gradients(sizes: Sizes, stage: str, setup: Setup) -> float:
    """Return the bytes of all gradients stored on this rank."""
    full = sizes.trained_parameters(stage) * FLOAT32
    return full / setup.ranks if setup.zero >= 2 else full


def _waiting_gradients(sizes: Sizes, stage: str, setup: Setup) -> float:
    """Return the bytes of gradients that exist before a backward pass.

    They come from earlier micro-batches; those of the previous step are dropped.
    """
    return _gradients(sizes, stage, setup) if setup.passes > 1 or setup.zero == 3 else 0


def _target_pass(sizes: Sizes, stage: str, setup: Setup) -> Parts:
    """Return the peak of the target pass: in a layer's FFN, or later in the head for the bonus tokens."""
    hidden = setup.clean * sizes.hidden * setup.weight_bytes
    layer, bonus = max(ffn(sizes, setup, setup.clean, layer) for layer in sizes.all_layers[:-1]), 0
    if stage != ATTENTION_TUNING:
        bonus = hidden + setup.blocks * sizes.vocabulary * setup.arithmetic
    whole = _target_hidden(sizes, stage, setup) > 0
    mask = setup.clean * setup.max_seq_len * (BOOL + setup.arithmetic) if setup.attention == "dense" else 0
    return {
        "gradients": _waiting_gradients(sizes, stage, setup),
        "activations": max(layer, bonus),
        "K/V and masks": (sizes.draft_layers - (0 if whole else 1)) * clean_kv(sizes, setup) + mask,
    }


def _mask_pass(sizes: Sizes, stage: str, setup: Setup) -> Parts:
    """Return the peak of the mask pass: in the last draft layer's FFN, plus saved activations if layers are trained."""
    masks, tuning = setup.masks(sizes), sizes.trains_layers(stage)
    parts = saved(sizes, setup) if tuning else dict.fromkeys(PARTS, 0.0)
    parts["gradients"] = _waiting_gradients(sizes, stage, setup)
    kept = tuning and not setup.recompute
    parts["activations"] += ffn(sizes, setup, masks, sizes.drafting[-1], beside_saved=kept)
    parts["activations"] += _target_hidden(sizes, stage, setup)
    if not (tuning and setup.recompute):
        parts["K/V and masks"] += views(sizes, setup)
    return parts


def _tuning_loss(sizes: Sizes, setup: Setup) -> Parts:
    """Return the peak of the stage 1 loss: in the last piece, while computing the hidden states' gradient."""
    masks, piece = setup.masks(sizes), setup.piece(sizes)
    stream = sizes.hidden * setup.weight_bytes
    parts = saved(sizes, setup)
    parts["gradients"] = _waiting_gradients(sizes, ATTENTION_TUNING, setup)
    # The final norm's input in float32, its output and the gradient of that; the piece's hidden states.
    parts["activations"] += masks * (FLOAT32 * sizes.hidden + 2 * stream) + piece * stream
    parts["activations"] += _target_hidden(sizes, ATTENTION_TUNING, setup)
    parts["logits"] = piece * sizes.vocabulary * _word(setup)
    if setup.autocast and setup.weight_bytes == FLOAT32:
        parts["bfloat16 copies"] += BFLOAT16 * sizes.embedding_parameters  # the head's
    return parts


def _tuning_backward(sizes: Sizes, stage: str, setup: Setup) -> Parts:
    """Return the peak of backward: in the last draft layer, or in the first, when all gradients exist."""
    begin, end = saved(sizes, setup), saved_by_a_layer(sizes, setup, sizes.drafting[0])
    if setup.recompute:
        last = saved_by_a_layer(sizes, setup, sizes.drafting[-1])
        begin = {part: begin[part] + last[part] for part in begin}
    begin["gradients"] = _waiting_gradients(sizes, stage, setup)
    if stage != ATTENTION_TUNING:  # of the calibrator and chain
        begin["gradients"] += FLOAT32 * sizes.calibrator_parameters
    end["gradients"] = _gradients(sizes, stage, setup)
    parts = max(begin, end, key=lambda parts: sum(parts.values()))
    # Backward of a norm in float32: gradients of three operations and two intermediate factors.
    norm = 5 * FLOAT32 * sizes.hidden
    flowing = max(norm, *(ffn_gradients(sizes, setup, layer) for layer in sizes.drafting))
    return parts | {"activations": parts["activations"] + setup.masks(sizes) * flowing}


def _joint(sizes: Sizes, stage: str, setup: Setup) -> dict[str, Parts]:
    """Return loss and backward memory of stage 2 when it also trains layers.

    Memory with frozen layers plus the saved activations; then the backward pass through the layers.
    """
    kept = saved(sizes, setup)
    # The final norm's input in float32, its output and the gradient of that.
    kept["activations"] += setup.masks(sizes) * sizes.hidden * (FLOAT32 + 2 * setup.weight_bytes)
    loss, head = _calibrator_loss(sizes, stage, setup), _calibrator_backward(sizes, stage, setup)
    beside = [{part: own.get(part, 0) + kept.get(part, 0) for part in PARTS} for own in (loss, head)]
    backward = max(beside[1], _tuning_backward(sizes, stage, setup), key=lambda parts: sum(parts.values()))
    return {"loss": beside[0], "backward": backward}


def _calibrator_loss(sizes: Sizes, stage: str, setup: Setup) -> Parts:
    """Return the peak of the stage 2 loss: in the last piece. Of other pieces, only hidden states are kept."""
    stream = sizes.hidden * setup.weight_bytes
    parts = _calibrator_piece(sizes, setup)
    parts["gradients"] = _waiting_gradients(sizes, stage, setup)
    parts["activations"] += setup.masks(sizes) * stream
    parts["activations"] += _target_hidden(sizes, stage, setup) if setup.teacher else 0
    if setup.pieces(sizes) > 1:
        parts["bfloat16 copies"] = 0  # recomputed in the backward pass
    return parts


def _calibrator_backward(sizes: Sizes, stage: str, setup: Setup) -> Parts:
    """Return the peak of the stage 2 backward: recomputing a piece's logits, or accumulating its gradients."""
    again = setup.pieces(sizes) > 1
    logits = _calibrator_piece(sizes, setup) if again else _calibrator_piece(sizes, setup, setup.arithmetic)
    logits["gradients"] = _waiting_gradients(sizes, stage, setup)
    if again:  # autograd sums the pieces' gradients before adding them to earlier micro-batches'
        logits["gradients"] += FLOAT32 * sizes.calibrator_parameters
    new = FLOAT32 + (BFLOAT16 if setup.autocast else 0)
    adding = {"gradients": logits["gradients"] + new * sizes.calibrator_parameters}
    return max(logits, adding, key=lambda parts: sum(parts.values()))


def _calibrator_piece(sizes: Sizes, setup: Setup, word: int | None = None) -> Parts:
    """Return the memory of a stage 2 piece. `word`: bytes per logit; defaults to the peak of the loss."""
    piece = setup.piece(sizes)
    # The head's logits, the correction and their sum; and then what the loss makes of the sum.
    word = word or max(3 * setup.arithmetic, _word(setup))
    hidden = setup.blocks * setup.trained_slots(sizes) * sizes.hidden * setup.weight_bytes
    # The input of each correction, and its hidden units before and after SiLU.
    inputs = piece * sum(2 * sizes.hidden + 2 * rank for rank in sizes.corrections) * setup.arithmetic
    copies = BFLOAT16 * sizes.calibrator_parameters if setup.autocast else 0
    return {
        "activations": hidden + inputs,
        "bfloat16 copies": copies,
        "logits": piece * sizes.vocabulary * word,
    }


def _word(setup: Setup) -> int:
    """Return the peak bytes per logit while the loss converts logits to their gradient."""
    # Draft, teacher and their difference in float32; the head's logits, if those are not overwritten.
    draft, head = FLOAT32 * (3 if setup.teacher else 1), setup.arithmetic
    if head >= FLOAT32:
        return draft + (head if setup.compiled else 0)
    # The gradient goes where the logits are; compiled, it is another tensor, once teacher and difference are gone.
    return max(draft + head, FLOAT32 + (2 if setup.compiled else 1) * head)


def _optimizer_step(sizes: Sizes, stage: str, setup: Setup) -> Parts:
    """Return the memory of the optimizer step.

    AdamW's denominator, of all tensors at once or of the largest, plus flat gradients under ZeRO 1 and 2.
    """
    trained = sizes.trained_parameters(stage) * FLOAT32
    if setup.zero:
        flat = 0 if setup.zero == 3 else trained / setup.ranks
        return {"gradients": _gradients(sizes, stage, setup) + flat, "optimizer": trained / setup.ranks}
    temporary = trained if setup.multi_tensor else 2 * _largest_trained(sizes, stage) * FLOAT32
    return {"gradients": _gradients(sizes, stage, setup), "optimizer": temporary}


def _largest_trained(sizes: Sizes, stage: str) -> int:
    """Return the size of the largest trained tensor: a projection, the bonus slot, or W2."""
    tuned = sizes.hidden * max(sizes.queries, sizes.hidden if sizes.bonus_slot else 0)
    second = sizes.vocabulary * max(sizes.corrections, default=0)
    return max(tuned if sizes.trains_layers(stage) else 0, 0 if stage == ATTENTION_TUNING else second)


def _target_hidden(sizes: Sizes, stage: str, setup: Setup) -> float:
    """Return the bytes of the target's final hidden states, kept in stage 2 or if the objective needs the target."""
    wanted = stage != ATTENTION_TUNING or setup.teacher
    return setup.clean * sizes.hidden * setup.weight_bytes if wanted else 0
