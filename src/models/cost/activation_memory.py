"""What layers hold at the fullest moment of a forward pass, and keep for the backward pass. Needs no torch.

The setting of a pass, and bytes, for `models.cost.memory`. Shapes as in `data.batch`.
"""

import math
from dataclasses import dataclass

from models.cost.sizes import Sizes

FLOAT32, BFLOAT16, BOOL, INDEX = 4, 2, 1, 8
TILE = 256  # that of models.attention.masks
REDUCE_BUCKET = 2 * 10**8  # Lightning's reduce_bucket_size for DeepSpeed: elements

Parts = dict[str, float]


@dataclass(frozen=True)
class Setup:
    """How a stage runs, as far as the memory of one rank depends on it."""

    rows: int  # of one pass
    max_seq_len: int
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
        return self.rows * self.max_seq_len

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
            return [(queries, self.max_seq_len + queries)]
        tiles, at_once = [], max(1, TILE // sizes.block_size)
        for first in range(0, self.num_anchors, at_once):
            last = min(first + at_once, self.num_anchors)
            queries = (last - first) * sizes.block_size
            context = (self.max_seq_len - sizes.block_size) * last / (self.num_anchors + 1)
            tiles.append((queries, context + queries))
        return tiles


def clean_kv(sizes: Sizes, setup: Setup) -> float:
    """K/V of the clean tokens in one layer. The rotation leaves keys in the dtype of the residual stream."""
    fused = sizes.queries + sizes.keys if sizes.family.fused else 0  # values are a part of that product, which lives on
    return setup.clean * (sizes.keys * (setup.weight_bytes + setup.arithmetic) + fused * setup.arithmetic)


def views(sizes: Sizes, setup: Setup) -> float:
    """What the draft layers are given to see: K/V of the clean tokens, and the mask. That of FlexAttention is small."""
    pairs = 0 if setup.attention == "flex" else setup.rows * sum(queries * keys for queries, keys in setup.tiles(sizes))
    return sizes.draft_layers * clean_kv(sizes, setup) + pairs * BOOL


def saved(sizes: Sizes, setup: Setup) -> Parts:
    """What the draft layers keep for the backward pass."""
    if setup.recompute:
        # The inputs; that of the first is one vector for all.
        inputs = (sizes.draft_layers - 1) * setup.masks(sizes) * sizes.hidden * setup.weight_bytes
        return {"activations": inputs, "K/V and masks": views(sizes, setup), "bfloat16 copies": 0}
    layers = [saved_by_a_layer(sizes, setup, layer) for layer in sizes.drafting]
    return {part: sum(layer[part] for layer in layers) for part in layers[0]}


def saved_by_a_layer(sizes: Sizes, setup: Setup, layer: int) -> Parts:
    """What one draft layer keeps for the backward pass."""
    tiles = setup.tiles(sizes)
    # Context and slots joined, in each tile or once; and the mask as numbers, but that of FlexAttention is small.
    kept = 2 * sizes.keys * sum(keys for _, keys in tiles)
    if setup.attention != "flex":
        kept += sum(queries * keys for queries, keys in tiles)
    copies = 0
    if setup.autocast:  # of the projectors, and of a frozen FFN unless it is bfloat16 already; experts are never cast
        frozen = setup.weight_bytes == FLOAT32 and not sizes.sparse[layer]
        own = sizes.attention_weights if sizes.updates is None or frozen else 0  # LoRA leaves them the target's
        copies = BFLOAT16 * (own + (sizes.updates or 0) + (sizes.ffn_weights(layer) if frozen else 0))
    token = _saved_by_attention(sizes, setup) + _saved_by_ffn(sizes, setup, layer)
    return {
        "activations": setup.masks(sizes) * token,
        "K/V and masks": setup.rows * kept * setup.arithmetic,
        "bfloat16 copies": copies,
    }


def _saved_by_attention(sizes: Sizes, setup: Setup) -> int:
    """What attention and norms of one draft layer keep of one mask token."""
    arithmetic, heads = setup.arithmetic, sizes.queries + sizes.keys
    outputs = 2 if setup.attention == "sdpa" else 1  # of the tiles, and joined
    # Log-sum-exp of the scores, rotated queries, output.
    attention = FLOAT32 * sizes.heads + (1 + outputs) * arithmetic * sizes.queries
    if setup.compiled:
        # What goes into matrix products and comes out, not what is computed from it at little cost: the stream before
        # attention and FFN, and normed; queries and keys before their norms.
        return attention + (2 * setup.weight_bytes + arithmetic) * sizes.hidden + arithmetic * heads
    # The inputs of the norms in float32. Normed, one for the projectors of queries, keys and values; or a copy for
    # each, if it has to be cast.
    normed = arithmetic * (3 if setup.autocast and setup.weight_bytes == FLOAT32 else 1)
    stream = (sizes.family.norms * FLOAT32 + normed) * sizes.hidden
    # Of a norm of queries or keys: its input in float32; the normed one, for the weight, in the input's dtype.
    norms = (FLOAT32 + arithmetic) * heads if sizes.family.query_norms else 0
    return attention + stream + norms


def _saved_by_ffn(sizes: Sizes, setup: Setup, layer: int) -> int:
    """What the FFN of one draft layer keeps of one mask token."""
    gates = 2 if setup.compiled else 3  # gate, up; its activation is not worth keeping for a compiler
    if not sizes.sparse[layer]:
        return gates * setup.arithmetic * sizes.intermediate
    # Of each active expert that and its output, for the router's gradient; places in the order of experts and back.
    expert = (gates * sizes.expert_intermediate + sizes.hidden) * setup.weight_bytes
    return sizes.active * (expert + 4 * INDEX) + FLOAT32 * sizes.experts


def ffn(sizes: Sizes, setup: Setup, tokens: int, layer: int, *, beside_saved: bool = False) -> float:
    """The fullest moment of a layer: its input, the residual, that one's norm, and what its FFN makes.

    Args:
        beside_saved: without what is kept for the backward pass.
    """
    stream = 3 * setup.weight_bytes * sizes.hidden
    if not sizes.sparse[layer]:  # gate, up and their product; gate's activation, where it cannot take gate's place
        count = 1 if beside_saved else 4 if sizes.family.fused else 3
        return tokens * (stream + count * setup.arithmetic * sizes.intermediate)
    # For each active expert the input, and gate, up, an activation and their product; or the output, weighted, and in
    # the order of tokens.
    inner, outer = 4 * sizes.expert_intermediate, 3 * sizes.hidden
    if beside_saved:
        inner, outer = sizes.expert_intermediate, 2 * sizes.hidden
    return tokens * (stream + sizes.active * setup.weight_bytes * (sizes.hidden + max(inner, outer)))


def ffn_gradients(sizes: Sizes, setup: Setup, layer: int) -> int:
    """Gradients on the way back through a layer's FFN, of one token."""
    stream = setup.weight_bytes * sizes.hidden
    if not sizes.sparse[layer]:  # those of gate, up, their product and the residual stream
        return 3 * setup.arithmetic * sizes.intermediate + stream
    # Of each active expert the same, or three of its output: of the order, of its weight, its own.
    return 3 * sizes.active * setup.weight_bytes * max(sizes.expert_intermediate, sizes.hidden) + 2 * stream
