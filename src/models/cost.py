"""What training costs: parameters, and FLOPs of one optimizer step, from the sizes alone. Needs no torch.

FLOPs are those of matrix products, attention's included: 2 per multiply-add, as `torch.utils.flop_counter` counts them.
Memory is in `models.memory`. Shapes as in `data.batch`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ATTENTION_TUNING, BONUS_CALIBRATION = "attention_tuning", "bonus_calibration"


@dataclass(frozen=True)
class Sizes:
    """The sizes of a target with dense layers, and of its drafter."""

    hidden: int  # H
    intermediate: int  # of the FFN
    layers: int  # N
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int  # V
    tied: bool  # embedding and head are one matrix
    positions: int  # the longest sequence
    draft_layers: int  # L
    block_size: int  # B
    rank: int  # r, of the calibrator
    head_norms: bool = True  # norms of queries and keys, as Qwen3 has them
    attention_bias: bool = False

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], *, num_layers: int, block_size: int, calibrator_rank: int
    ) -> "Sizes":
        """
        Args:
            config: a model's config of `transformers` as a dict, such as its config.json.
            num_layers, block_size, calibrator_rank: the drafter's, as in conf/model/.

        Raises:
            ValueError: the config lacks a size, or is one of a mixture of experts.
        """
        if config.get("num_experts") or config.get("num_local_experts"):
            raise ValueError("mixtures of experts are not counted, only dense layers.")
        try:
            heads = config["num_attention_heads"]
            return cls(
                hidden=config["hidden_size"],
                intermediate=config["intermediate_size"],
                layers=config["num_hidden_layers"],
                heads=heads,
                kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or config["hidden_size"] // heads,
                vocabulary=config["vocab_size"],
                tied=bool(config.get("tie_word_embeddings", False)),
                positions=config["max_position_embeddings"],
                draft_layers=num_layers,
                block_size=block_size,
                rank=calibrator_rank,
                head_norms=str(config.get("model_type", "qwen3")).startswith("qwen3"),
                attention_bias=bool(config.get("attention_bias", False)),
            )
        except KeyError as error:
            raise ValueError(f"the config has no {error.args[0]}.") from error

    @property
    def queries(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads together, which is that of the value heads."""
        return self.kv_heads * self.head_dim

    @property
    def attention_weights(self) -> int:
        """Weights of the four projectors of one layer."""
        return 2 * self.hidden * (self.queries + self.keys)

    @property
    def ffn_weights(self) -> int:
        """Weights of the FFN of one layer: gate, up and down."""
        return 3 * self.hidden * self.intermediate

    @property
    def attention_parameters(self) -> int:
        """Parameters of one layer's attention: projectors, their biases, head norms."""
        biases = (self.queries + 2 * self.keys + self.hidden) if self.attention_bias else 0
        return self.attention_weights + biases + (2 * self.head_dim if self.head_norms else 0)

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer of the target: attention, FFN, two norms."""
        return self.attention_parameters + self.ffn_weights + 2 * self.hidden

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding; the head has as many."""
        return self.vocabulary * self.hidden

    @property
    def target_parameters(self) -> int:
        """Parameters of the target: embedding, layers, final norm, head unless tied."""
        matrices = 1 if self.tied else 2
        return matrices * self.embedding_parameters + self.layers * self.layer_parameters + self.hidden

    @property
    def tuned_parameters(self) -> int:
        """Parameters that stage 1 trains: attention of the draft layers and the mask embedding."""
        return self.draft_layers * self.attention_parameters + self.hidden

    @property
    def calibrator_parameters(self) -> int:
        """Parameters that stage 2 trains: W1, b1, W2, b2."""
        return (2 * self.hidden + 1) * self.rank + (self.rank + 1) * self.vocabulary

    def trained_parameters(self, stage: str) -> int:
        """Parameters that a stage trains."""
        return self.tuned_parameters if stage == ATTENTION_TUNING else self.calibrator_parameters

    def draft_parameters(self, stage: str) -> int:
        """Parameters of the drafter in a stage; after stage 2, those that are exported."""
        return self.tuned_parameters + (self.calibrator_parameters if stage == BONUS_CALIBRATION else 0)


def step_flops(
    sizes: Sizes,
    stage: str,
    *,
    rows: int,
    row_length: int,
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
        clean_pairs, mask_pairs: of a query and a key that attention computes, in all rows together; None: those that
            the masks allow, were each row a single document with anchors all over it.
        twice: what is computed a second time to save memory; None: nothing, as the floor is counted.

    Returns:
        `target pass`, `mask pass`, `head and loss`, `calibrator` (0 in stage 1); their sum is the step.
    """
    tuning = stage == ATTENTION_TUNING
    twice = twice or Twice()
    clean, blocks = rows * row_length, rows * num_anchors
    masks = blocks * sizes.block_size
    if supervised is None:
        supervised = blocks * (sizes.block_size - (0 if slot0_loss else 1))
    if clean_pairs is None:
        clean_pairs = rows * row_length * (row_length + 1) / 2
    if mask_pairs is None:
        mask_pairs = masks * (row_length / 2 + sizes.block_size)
    linear = 2 * (sizes.attention_weights + sizes.ffn_weights)  # of one token in one layer
    pair = 2 * 2 * sizes.queries  # scores and weighted values
    layer = clean * linear + clean_pairs * pair
    target = sizes.layers * layer
    if tuning and not teacher:
        # Of the last layer only keys and values are of use; transformers' modules compute the queries before these.
        target -= layer - clean * 2 * sizes.hidden * (sizes.queries + 2 * sizes.keys)
    forward = sizes.draft_layers * (masks * linear + mask_pairs * pair)
    mask = forward
    if tuning:
        # Backward: each linear map once for its input, the projectors once more for their weights. Attention has a
        # gradient for each of its two products' factors; fused kernels compute the scores again.
        attention = (2.5 if twice.scores else 2) * pair
        mask += sizes.draft_layers * (masks * (linear + 2 * sizes.attention_weights) + mask_pairs * attention)
        if twice.layers:  # up to the last tensor that was kept, which is not the FFN's output
            mask += forward - sizes.draft_layers * masks * 2 * sizes.hidden * sizes.intermediate
    head = 2 * sizes.embedding_parameters
    forwards = 2 if twice.logits else 1
    # Stage 1 takes the gradient down to the hidden state; the head itself is frozen.
    loss = supervised * head * ((2 if tuning else forwards) + (forwards if teacher else 0))
    calibrator = 0.0
    if not tuning:
        first, second = 2 * 2 * sizes.hidden * sizes.rank, 2 * sizes.rank * sizes.vocabulary
        # Backward: W1 for its weights only, since its input is frozen; W2 for its weights and its input.
        calibrator = supervised * (forwards * (first + second) + first + 2 * second)
        target += blocks * head  # the bonus tokens
    return {"target pass": target, "mask pass": mask, "head and loss": loss, "calibrator": calibrator}


@dataclass(frozen=True)
class Twice:
    """What a step computes again in its backward pass, so as not to keep it."""

    scores: bool = False  # of attention
    layers: bool = False  # draft layers: `speed.recompute`
    logits: bool = False  # in stage 2 with more than one chunk


def decoding_flops(sizes: Sizes, *, context: float, candidates: float, blocks: float) -> dict[str, float]:
    """FLOPs of one step of decoding for one row that cannot be done without, by part.

    Args:
        context: tokens in the cache.
        candidates: C, tokens that the target scores, bonus included.
        blocks: that go through the draft layers: 0 without a drafter, 1 in sequential mode, C in parallel mode. All but
            one are redundant.

    Returns:
        `target`, `draft`, `redundant blocks`, `head` (of candidates and of one block), `calibrator`.
    """
    linear = 2 * (sizes.attention_weights + sizes.ffn_weights)  # of one token in one layer
    pair = 2 * 2 * sizes.queries  # scores and weighted values
    slots = sizes.block_size
    block = sizes.draft_layers * slots * (linear + (context + slots) * pair)
    drafted = slots - 1 if blocks else 0
    return {
        "target": sizes.layers * candidates * (linear + (context + candidates / 2) * pair),
        "draft": min(blocks, 1) * block,
        "redundant blocks": max(0, blocks - 1) * block,
        "head": (candidates + drafted) * 2 * sizes.embedding_parameters,
        "calibrator": drafted * (2 * 2 * sizes.hidden * sizes.rank + 2 * sizes.rank * sizes.vocabulary),
    }
