"""Peak activation memory of layers in the forward pass, and memory saved for the backward pass. Needs no torch.

Execution settings and byte counts for `models.cost.memory`. Shapes as in `data.batch`.
"""

import math
from dataclasses import dataclass

from models.cost.sizes import Sizes

FLOAT32, BFLOAT16, BOOL, INDEX = 4, 2, 1, 8
TILE = 256  # same as in models.attention.masks
REDUCE_BUCKET = 2 * 10**8  # Lightning's reduce_bucket_size for DeepSpeed: elements

Parts = dict[str, float]


@dataclass(frozen=True)
class Setup:
    """Settings of a stage that determine the memory of one rank."""

    rows: int  # per micro-batch
    max_seq_len: int
    num_anchors: int
    chunk: int  # slots whose logits are held at once
    passes: int = 1  # micro-batches per optimizer step
    slot0_loss: bool = False
    teacher: bool = False  # whether the objective uses the target's distribution
    attention: str = "flex"  # flex | sdpa | dense
    compiled: bool = False  # torch.compile of layers and loss
    recompute: bool = False  # activation checkpointing of the draft layers
    weight_bytes: int = FLOAT32  # bytes per target weight and per residual stream element
    autocast: bool = False  # bfloat16 arithmetic on float32 weights
    ranks: int = 1
    ddp: bool = False
    zero: int = 0  # DeepSpeed's ZeRO stage; 0: none
    reduce_bucket: int = REDUCE_BUCKET
    multi_tensor: bool = True  # AdamW updates all tensors at once (GPU) or one by one (CPU)

    @property
    def clean(self) -> int:
        """Clean tokens per micro-batch."""
        return self.rows * self.max_seq_len

    @property
    def blocks(self) -> int:
        """Blocks per micro-batch."""
        return self.rows * self.num_anchors

    @property
    def arithmetic(self) -> int:
        """Bytes per element in matrix products."""
        return BFLOAT16 if self.autocast else self.weight_bytes

    def masks(self, sizes: Sizes) -> int:
        """Mask tokens per micro-batch."""
        return self.blocks * sizes.block_size

    def trained_slots(self, sizes: Sizes) -> int:
        """Slots per block that can contribute to the loss."""
        return sizes.block_size - (0 if self.slot0_loss else 1)

    def piece(self, sizes: Sizes) -> int:
        """Slots of the largest loss piece, which consists of complete blocks."""
        slots = self.trained_slots(sizes)
        return min(self.blocks, max(1, self.chunk // slots)) * slots

    def pieces(self, sizes: Sizes) -> int:
        """Number of pieces in which the loss is computed."""
        return math.ceil(self.blocks * self.trained_slots(sizes) / self.piece(sizes))

    def tiles(self, sizes: Sizes) -> list[tuple[int, float]]:
        """Return (queries, keys) of each attention tile of a row's mask tokens.

        For `sdpa`, the tiles of `masks.block_tiles` for a single document with evenly spread anchors; otherwise one
        tile with all queries and keys.
        """
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
    """Return the bytes of the clean tokens' K/V in one layer. RoPE outputs keys in the residual stream's dtype."""
    fused = sizes.queries + sizes.keys if sizes.family.fused else 0  # values are views of the fused product
    return setup.clean * (sizes.keys * (setup.weight_bytes + setup.arithmetic) + fused * setup.arithmetic)


def views(sizes: Sizes, setup: Setup) -> float:
    """Return the bytes of the draft layers' context K/V and mask. FlexAttention's mask is negligible."""
    pairs = 0 if setup.attention == "flex" else setup.rows * sum(queries * keys for queries, keys in setup.tiles(sizes))
    return sizes.draft_layers * clean_kv(sizes, setup) + pairs * BOOL


def saved(sizes: Sizes, setup: Setup) -> Parts:
    """Return the bytes saved by all draft layers for the backward pass."""
    if setup.recompute:
        # Layer inputs; the first layer's is a single vector, expanded.
        inputs = (sizes.draft_layers - 1) * setup.masks(sizes) * sizes.hidden * setup.weight_bytes
        return {"activations": inputs, "K/V and masks": views(sizes, setup), "bfloat16 copies": 0}
    layers = [saved_by_a_layer(sizes, setup, layer) for layer in sizes.drafting]
    return {part: sum(layer[part] for layer in layers) for part in layers[0]}


def saved_by_a_layer(sizes: Sizes, setup: Setup, layer: int) -> Parts:
    """Return the bytes saved by one draft layer for the backward pass."""
    tiles = setup.tiles(sizes)
    # Concatenated K/V of context and slots, per tile or once, plus the mask as floats (negligible for FlexAttention).
    kept = 2 * sizes.keys * sum(keys for _, keys in tiles)
    if setup.attention != "flex":
        kept += sum(queries * keys for queries, keys in tiles)
    copies = 0
    if setup.autocast:  # of projections, and of a frozen FFN unless already bfloat16; experts are never cast
        frozen = setup.weight_bytes == FLOAT32 and not sizes.sparse[layer]
        own = sizes.attention_weights if sizes.updates is None or frozen else 0  # with LoRA, the target's own
        copies = BFLOAT16 * (own + (sizes.updates or 0) + (sizes.ffn_weights(layer) if frozen else 0))
    token = _saved_by_attention(sizes, setup) + _saved_by_ffn(sizes, setup, layer)
    return {
        "activations": setup.masks(sizes) * token,
        "K/V and masks": setup.rows * kept * setup.arithmetic,
        "bfloat16 copies": copies,
    }


def _saved_by_attention(sizes: Sizes, setup: Setup) -> int:
    """Return the bytes saved per mask token by attention and norms of one draft layer."""
    arithmetic, heads = setup.arithmetic, sizes.queries + sizes.keys
    outputs = 2 if setup.attention == "sdpa" else 1  # per tile, and concatenated
    # Log-sum-exp of the scores, rotated queries, attention output.
    attention = FLOAT32 * sizes.heads + (1 + outputs) * arithmetic * sizes.queries
    if setup.compiled:
        # Inputs and outputs of matrix products, without cheaply recomputed tensors: the residual stream before
        # attention and FFN, its normalized value, and queries and keys before their norms.
        return attention + (2 * setup.weight_bytes + arithmetic) * sizes.hidden + arithmetic * heads
    # Norm inputs in float32. The normalized tensor is shared by the query, key and value projections, or copied for
    # each if it must be cast.
    normed = arithmetic * (3 if setup.autocast and setup.weight_bytes == FLOAT32 else 1)
    stream = (sizes.family.norms * FLOAT32 + normed) * sizes.hidden
    # Query/key norms: input in float32, and the normalized tensor (for the weight) in the input's dtype.
    norms = (FLOAT32 + arithmetic) * heads if sizes.family.query_norms else 0
    return attention + stream + norms


def _saved_by_ffn(sizes: Sizes, setup: Setup, layer: int) -> int:
    """Return the bytes saved per mask token by the FFN of one draft layer."""
    gates = 2 if setup.compiled else 3  # gate, up, activation; the compiler recomputes the activation
    if not sizes.sparse[layer]:
        return gates * setup.arithmetic * sizes.intermediate
    # Per active expert: the same plus its output (for the router's gradient), and indices to sort by expert and back.
    expert = (gates * sizes.expert_intermediate + sizes.hidden) * setup.weight_bytes
    return sizes.active * (expert + 4 * INDEX) + FLOAT32 * sizes.experts


def ffn(sizes: Sizes, setup: Setup, tokens: int, layer: int, *, beside_saved: bool = False) -> float:
    """Return the peak bytes of a layer, reached in its FFN: layer input, residual, its norm, and FFN tensors.

    Args:
        beside_saved: exclude tensors saved for the backward pass.
    """
    stream = 3 * setup.weight_bytes * sizes.hidden
    if not sizes.sparse[layer]:  # gate, up, product; gate's activation if not in place
        count = 1 if beside_saved else 4 if sizes.family.fused else 3
        return tokens * (stream + count * setup.arithmetic * sizes.intermediate)
    # Per active expert: the input, plus either gate, up, activation and product, or the output, the weighted output and
    # the output in token order.
    inner, outer = 4 * sizes.expert_intermediate, 3 * sizes.hidden
    if beside_saved:
        inner, outer = sizes.expert_intermediate, 2 * sizes.hidden
    return tokens * (stream + sizes.active * setup.weight_bytes * (sizes.hidden + max(inner, outer)))


def ffn_gradients(sizes: Sizes, setup: Setup, layer: int) -> int:
    """Return the bytes of gradients per token in the backward pass of a layer's FFN."""
    stream = setup.weight_bytes * sizes.hidden
    if not sizes.sparse[layer]:  # gate, up, product, residual stream
        return 3 * setup.arithmetic * sizes.intermediate + stream
    # Per active expert the same, or three output gradients: in token order, weighted, and the expert's own.
    return 3 * sizes.active * setup.weight_bytes * max(sizes.expert_intermediate, sizes.hidden) + 2 * stream
