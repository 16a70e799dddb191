"""Memory of one rank in a training step, by phase and part, from the sizes alone. Needs no torch.

Counted are the tensors that are alive at the fullest moment of each phase, as `models.draft`, `models.attention`,
`models.block_loss` and transformers' layers make them; docs/preflight.md compares the sums with measured peaks. That is
on CPUs: what FlexAttention keeps is derived from the code. All results are in bytes. Shapes as in `data.batch`.
"""

import math
from dataclasses import dataclass

from models.cost import ATTENTION_TUNING, Sizes

FLOAT32, BFLOAT16, BOOL = 4, 2, 1
TILE = 256  # that of models.masks
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
    teacher: bool = False  # whether the objective compares with the target's distribution
    attention: str = "flex"  # flex | sdpa | dense
    compiled: bool = False  # layers and loss
    recompute: bool = False  # the draft layers' activations in the backward pass
    weight_bytes: int = FLOAT32  # of one weight of the target, and of a number in its residual stream
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

    @property
    def blocks(self) -> int:
        """Blocks of a pass."""
        return self.rows * self.num_anchors

    @property
    def arithmetic(self) -> int:
        """Bytes of a number in matrix products."""
        return BFLOAT16 if self.autocast else self.weight_bytes

    def masks(self, sizes: Sizes) -> int:
        """Mask tokens of a pass."""
        return self.blocks * sizes.block_size

    def trained_slots(self, sizes: Sizes) -> int:
        """Slots of a block that may carry a loss."""
        return sizes.block_size - (0 if self.slot0_loss else 1)

    def piece(self, sizes: Sizes) -> int:
        """Slots of the greatest piece of the loss: whole blocks."""
        slots = self.trained_slots(sizes)
        return min(self.blocks, max(1, self.chunk // slots)) * slots

    def pieces(self, sizes: Sizes) -> int:
        """In how many pieces the loss is computed."""
        return math.ceil(self.blocks * self.trained_slots(sizes) / self.piece(sizes))

    def tiles(self, sizes: Sizes) -> list[tuple[int, float]]:
        """Queries and keys of each tile of a row's mask tokens, as `masks.block_tiles` cuts it if the row is a single
        document with anchors all over it; but for `sdpa`, one tile of all queries and keys."""
        queries = self.num_anchors * sizes.block_size
        if self.attention != "sdpa":
            return [(queries, self.row_length + queries)]
        tiles, at_once = [], max(1, TILE // sizes.block_size)
        for first in range(0, self.num_anchors, at_once):
            last = min(first + at_once, self.num_anchors)
            queries = (last - first) * sizes.block_size
            context = (self.row_length - sizes.block_size) * last / (self.num_anchors + 1)
            tiles.append((queries, context + queries))
        return tiles


def step_memory(sizes: Sizes, stage: str, setup: Setup) -> dict[str, Parts]:
    """Bytes by phase of a step and by part. The peak is the phase with the greatest sum."""
    phases = {"target pass": _target_pass(sizes, stage, setup), "mask pass": _mask_pass(sizes, stage, setup)}
    if stage == ATTENTION_TUNING:
        phases |= {"loss": _tuning_loss(sizes, setup), "backward": _tuning_backward(sizes, setup)}
    else:
        phases |= {"loss": _calibrator_loss(sizes, stage, setup), "backward": _calibrator_backward(sizes, stage, setup)}
    phases["optimizer"] = _optimizer_step(sizes, stage, setup)
    if setup.zero in (1, 2):  # two buckets, one fills while the other is reduced; ZeRO 3 keeps a single one for good
        phases["backward"]["other"] = 2 * setup.reduce_bucket * FLOAT32
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
    """Gradients that are there before a backward pass: of earlier passes; those of the step before are dropped."""
    return _gradients(sizes, stage, setup) if setup.passes > 1 or setup.zero == 3 else 0


def _target_pass(sizes: Sizes, stage: str, setup: Setup) -> Parts:
    """In the FFN of the last layer that is run to its end; or, after that, at the head for the bonus tokens."""
    hidden = setup.clean * sizes.hidden * setup.weight_bytes
    layer, bonus = _ffn(sizes, setup, setup.clean), 0
    if stage != ATTENTION_TUNING:
        bonus = hidden + setup.blocks * sizes.vocabulary * setup.arithmetic
    whole = _target_hidden(sizes, stage, setup) > 0
    mask = setup.clean * setup.row_length * (BOOL + setup.arithmetic) if setup.attention == "dense" else 0
    return {
        "gradients": _waiting_gradients(sizes, stage, setup),
        "activations": max(layer, bonus),
        "K/V and masks": (sizes.draft_layers - (0 if whole else 1)) * _clean_kv(sizes, setup) + mask,
    }


def _mask_pass(sizes: Sizes, stage: str, setup: Setup) -> Parts:
    """In the FFN of the last draft layer. In stage 1 the layers' activations are kept for the backward pass."""
    masks, tuning = setup.masks(sizes), stage == ATTENTION_TUNING
    parts = _saved(sizes, setup) if tuning else dict.fromkeys(PARTS, 0.0)
    parts["gradients"] = _waiting_gradients(sizes, stage, setup)
    parts["activations"] += _ffn(sizes, setup, masks) + _target_hidden(sizes, stage, setup)
    if tuning and not setup.recompute:
        parts["activations"] -= 2 * masks * sizes.intermediate * setup.arithmetic  # counted among the saved
    if not (tuning and setup.recompute):
        parts["K/V and masks"] += _views(sizes, setup)
    return parts


def _tuning_loss(sizes: Sizes, setup: Setup) -> Parts:
    """Stage 1, in the last piece: its logits become their gradient, and that one the hidden states'."""
    masks, piece = setup.masks(sizes), setup.piece(sizes)
    stream = sizes.hidden * setup.weight_bytes
    parts = _saved(sizes, setup)
    parts["gradients"] = _waiting_gradients(sizes, ATTENTION_TUNING, setup)
    # The final norm's input in float32, its output and the gradient of that; the piece's hidden states.
    parts["activations"] += masks * (FLOAT32 * sizes.hidden + 2 * stream) + piece * stream
    parts["activations"] += _target_hidden(sizes, ATTENTION_TUNING, setup)
    parts["logits"] = piece * sizes.vocabulary * _word(setup)
    if setup.autocast and setup.weight_bytes == FLOAT32:
        parts["bfloat16 copies"] += BFLOAT16 * sizes.embedding_parameters  # the head's
    return parts


def _tuning_backward(sizes: Sizes, setup: Setup) -> Parts:
    """Stage 1, in the last draft layer; or in the first, where all gradients are there and no other layer's tensors."""
    begin, end = _saved(sizes, setup), _saved_by_a_layer(sizes, setup)
    if setup.recompute:
        begin = {part: begin[part] + end[part] for part in begin}
    begin["gradients"] = _waiting_gradients(sizes, ATTENTION_TUNING, setup)
    end["gradients"] = _gradients(sizes, ATTENTION_TUNING, setup)
    parts = max(begin, end, key=lambda parts: sum(parts.values()))
    # Through a norm, in float32: the gradients of three steps, and two factors on the way. Through the FFN: those of
    # gate, up, their product and the residual stream.
    norm = 5 * FLOAT32 * sizes.hidden
    ffn = 3 * setup.arithmetic * sizes.intermediate + setup.weight_bytes * sizes.hidden
    return parts | {"activations": parts["activations"] + setup.masks(sizes) * max(norm, ffn)}


def _calibrator_loss(sizes: Sizes, stage: str, setup: Setup) -> Parts:
    """Stage 2, in the last piece. With more pieces than one, nothing but their hidden states is kept of the others."""
    stream = sizes.hidden * setup.weight_bytes
    parts = _calibrator_piece(sizes, setup)
    parts["gradients"] = _waiting_gradients(sizes, stage, setup)
    parts["activations"] += setup.masks(sizes) * stream
    parts["activations"] += _target_hidden(sizes, stage, setup) if setup.teacher else 0
    if setup.pieces(sizes) > 1:
        parts["bfloat16 copies"] = 0  # made again in the backward pass, too
    return parts


def _calibrator_backward(sizes: Sizes, stage: str, setup: Setup) -> Parts:
    """Stage 2, in the last piece: its logits once more, or its gradients before they are added to the others'."""
    again = setup.pieces(sizes) > 1
    logits = _calibrator_piece(sizes, setup) if again else _calibrator_piece(sizes, setup, setup.arithmetic)
    logits["gradients"] = _waiting_gradients(sizes, stage, setup)
    if again:  # autograd adds up the pieces' gradients before it adds the sum to those of earlier passes
        logits["gradients"] += FLOAT32 * sizes.calibrator_parameters
    new = FLOAT32 + (BFLOAT16 if setup.autocast else 0)
    adding = {"gradients": logits["gradients"] + new * sizes.calibrator_parameters}
    return max(logits, adding, key=lambda parts: sum(parts.values()))


def _calibrator_piece(sizes: Sizes, setup: Setup, word: int | None = None) -> Parts:
    """Of a piece in stage 2. `word`: bytes for a slot and a word of V, if not those of the loss at its fullest."""
    piece = setup.piece(sizes)
    # The head's logits, the correction and their sum; and then what the loss makes of the sum.
    word = word or max(3 * setup.arithmetic, _word(setup))
    hidden = setup.blocks * setup.trained_slots(sizes) * sizes.hidden * setup.weight_bytes
    # The calibrator's input, and its hidden units before and after SiLU.
    inputs = piece * (2 * sizes.hidden + 2 * sizes.rank) * setup.arithmetic
    copies = BFLOAT16 * sizes.calibrator_parameters if setup.autocast else 0
    return {
        "activations": hidden + inputs,
        "bfloat16 copies": copies,
        "logits": piece * sizes.vocabulary * word,
    }


def _word(setup: Setup) -> int:
    """Bytes for a slot and a word of V while the loss turns logits into their gradient."""
    # Draft, teacher and their difference in float32; the head's logits, if those are not overwritten.
    draft, head = FLOAT32 * (3 if setup.teacher else 1), setup.arithmetic
    if head >= FLOAT32:
        return draft + (head if setup.compiled else 0)
    # The gradient goes where the logits are; compiled, it is another tensor, once teacher and difference are gone.
    return max(draft + head, FLOAT32 + (2 if setup.compiled else 1) * head)


def _optimizer_step(sizes: Sizes, stage: str, setup: Setup) -> Parts:
    """AdamW's denominator, of all tensors at once or of the largest; under ZeRO 1 and 2 also flat gradients."""
    trained = sizes.trained_parameters(stage) * FLOAT32
    if setup.zero:
        flat = 0 if setup.zero == 3 else trained / setup.ranks
        return {"gradients": _gradients(sizes, stage, setup) + flat, "optimizer": trained / setup.ranks}
    largest = sizes.hidden * sizes.queries if stage == ATTENTION_TUNING else sizes.vocabulary * sizes.rank
    temporary = trained if setup.multi_tensor else 2 * largest * FLOAT32
    return {"gradients": _gradients(sizes, stage, setup), "optimizer": temporary}


def _target_hidden(sizes: Sizes, stage: str, setup: Setup) -> float:
    """The target's last hidden states, which are kept for a teacher's distribution, and in stage 2 in any case."""
    wanted = stage != ATTENTION_TUNING or setup.teacher
    return setup.clean * sizes.hidden * setup.weight_bytes if wanted else 0


def _clean_kv(sizes: Sizes, setup: Setup) -> float:
    """K/V of the clean tokens in one layer. The rotation leaves keys in the dtype of the residual stream."""
    return setup.clean * sizes.keys * (setup.weight_bytes + setup.arithmetic)


def _views(sizes: Sizes, setup: Setup) -> float:
    """What the draft layers are given to see: K/V of the clean tokens, and the mask. That of FlexAttention is small."""
    pairs = 0 if setup.attention == "flex" else setup.rows * sum(queries * keys for queries, keys in setup.tiles(sizes))
    return sizes.draft_layers * _clean_kv(sizes, setup) + pairs * BOOL


def _saved(sizes: Sizes, setup: Setup) -> Parts:
    """What the draft layers keep for the backward pass."""
    if not setup.recompute:
        return {part: sizes.draft_layers * kept for part, kept in _saved_by_a_layer(sizes, setup).items()}
    # The inputs; that of the first is one vector for all.
    inputs = (sizes.draft_layers - 1) * setup.masks(sizes) * sizes.hidden * setup.weight_bytes
    return {"activations": inputs, "K/V and masks": _views(sizes, setup), "bfloat16 copies": 0}


def _saved_by_a_layer(sizes: Sizes, setup: Setup) -> Parts:
    """What one draft layer keeps for the backward pass."""
    tiles = setup.tiles(sizes)
    # Context and slots joined, in each tile or once; and the mask as numbers, but that of FlexAttention is small.
    kept = 2 * sizes.keys * sum(keys for _, keys in tiles)
    if setup.attention != "flex":
        kept += sum(queries * keys for queries, keys in tiles)
    copies = 0
    if setup.autocast:  # of the projectors, and of a frozen FFN unless it is bfloat16 already
        frozen = sizes.ffn_weights if setup.weight_bytes == FLOAT32 else 0
        copies = BFLOAT16 * (sizes.attention_weights + frozen)
    return {
        "activations": setup.masks(sizes) * _saved_of_a_token(sizes, setup),
        "K/V and masks": setup.rows * kept * setup.arithmetic,
        "bfloat16 copies": copies,
    }


def _saved_of_a_token(sizes: Sizes, setup: Setup) -> int:
    """What one draft layer keeps of one mask token."""
    arithmetic, heads = setup.arithmetic, sizes.queries + sizes.keys
    outputs = 2 if setup.attention == "sdpa" else 1  # of the tiles, and joined
    # Log-sum-exp of the scores, rotated queries, output.
    attention = FLOAT32 * sizes.heads + (1 + outputs) * arithmetic * sizes.queries
    if setup.compiled:
        # What goes into matrix products and comes out, not what is computed from it at little cost: the stream before
        # attention and FFN, and normed; queries and keys before their norms; gate and up.
        stream = (2 * setup.weight_bytes + arithmetic) * sizes.hidden
        return attention + stream + arithmetic * (heads + 2 * sizes.intermediate)
    # The inputs of the two norms in float32. Normed, one for the projectors of queries, keys and values; or a copy for
    # each, if it has to be cast.
    normed = arithmetic * (3 if setup.autocast and setup.weight_bytes == FLOAT32 else 1)
    stream = (2 * FLOAT32 + normed) * sizes.hidden
    # Of a head norm: its input in float32; the normed one, for the weight, in the input's dtype.
    norms = (FLOAT32 + arithmetic) * heads if sizes.head_norms else 0
    return attention + stream + norms + 3 * arithmetic * sizes.intermediate  # gate, its activation, up


def _ffn(sizes: Sizes, setup: Setup, tokens: int) -> float:
    """The fullest moment of a layer: its input, the residual, that one's norm, and gate, up and their product."""
    return tokens * (3 * setup.weight_bytes * sizes.hidden + 3 * setup.arithmetic * sizes.intermediate)
