"""Sizes of a target and its drafter, and parameter counts derived from them. Needs no torch.

Supports the families in `FAMILIES`; tests/models/test_sizes.py checks all counts against transformers' modules.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from models.draft_config import ATTENTION_TUNING, BONUS_CALIBRATION, DraftConfig


@dataclass(frozen=True)
class Family:
    """Layer structure of a `model_type` beyond attention projections and a gated FFN."""

    norms: int = 2  # norms of the residual stream per layer
    query_norms: str | None = None  # head: one norm per query/key head; width: over all heads
    bias: bool = False  # biases of query/key/value projections, regardless of the config
    fused: bool = False  # fused gate/up and fused query/key/value projections


FAMILIES = {
    "gemma3_text": Family(norms=4, query_norms="head"),
    "llama": Family(),
    "mistral": Family(),
    "olmo2": Family(query_norms="width"),
    "phi3": Family(fused=True),
    "qwen2": Family(bias=True),
    "qwen3": Family(query_norms="head"),
    "qwen3_moe": Family(query_norms="head"),
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of a target and its drafter. Layers are numbered from 0; the last `draft_layers` are the draft layers."""

    hidden: int  # H
    intermediate: int  # of a dense layer's FFN
    layers: int  # N
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int  # V
    tied: bool  # embedding and head share one matrix
    positions: int  # maximum sequence length
    draft: DraftConfig
    draft_layers: int  # L
    block_size: int  # B
    rank: int  # r, of the calibrator; 0: none
    family: Family
    attention_biases: int  # bias parameters per layer
    ffn_biases: int
    windows: tuple[int | None, ...]  # [N] maximum keys per query; None: no window
    sparse: tuple[bool, ...]  # [N] whether a layer has experts instead of a dense FFN
    experts: int  # experts per sparse layer
    active: int  # active experts per token
    expert_intermediate: int  # of one expert
    bonus_slot: bool = False  # whether slot 0's input can encode a known bonus token
    chain_rank: int = 0  # rank of the MLP conditioned on the previous draft; 0: none
    joint: bool = False  # whether stage 2 also trains the parameters of stage 1
    updates: int | None = None  # LoRA parameters per layer; None: full projections are trained

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        *,
        joint: bool = False,
        **draft: Any,
    ) -> "Sizes":
        """Build the sizes from a target's config and the drafter's settings.

        Args:
            config: a transformers model config as a dict, e.g. the content of config.json.
            joint: as in conf/stage/bonus_calibration.yaml.
            draft: arguments of `DraftConfig`.

        Raises:
            ValueError: the config lacks a size, or its family is not supported.
        """
        kind = config.get("model_type")
        if kind not in FAMILIES:
            raise ValueError(f"model_type={kind!r} is not counted; these are: {', '.join(FAMILIES)}.")
        try:
            return cls(
                **_layer_sizes(config, FAMILIES[kind]),
                **_expert_sizes(config),
                windows=_windows(config),
                vocabulary=config["vocab_size"],
                tied=bool(config.get("tie_word_embeddings", kind == "gemma3_text")),
                positions=config["max_position_embeddings"],
                draft=(parts := DraftConfig(**draft)),
                draft_layers=parts.num_layers,
                block_size=parts.block_size,
                rank=parts.calibrator_rank,
                bonus_slot=parts.bonus_slot,
                chain_rank=parts.chain_rank,
                joint=joint,
                family=FAMILIES[kind],
            )
        except KeyError as error:
            raise ValueError(f"the config has no {error.args[0]}.") from error

    def with_lora(self, rank: int, target_modules: Iterable[str] | None) -> "Sizes":
        """Return the sizes with LoRA (`models.lora.Lora`) in stage 1.

        Raises:
            ValueError: a projection does not exist, or `rank` exceeds the rank of a projection.
        """
        widths = {"q_proj": self.queries, "k_proj": self.keys, "v_proj": self.keys, "o_proj": self.queries}
        if self.family.fused:
            widths = {"qkv_proj": self.queries + 2 * self.keys, "o_proj": self.queries}
        chosen = set(widths if target_modules is None else target_modules)
        if not chosen or not chosen <= widths.keys():
            raise ValueError(f"adapter.target_modules={sorted(chosen)}: expected one or more of {', '.join(widths)}.")
        least = min(self.hidden, *(widths[name] for name in chosen))
        if rank > least:
            raise ValueError(
                f"adapter.rank={rank}: expected at most {least}, the smallest dimension of the adapted projections."
            )
        return replace(self, updates=rank * sum(self.hidden + widths[name] for name in chosen))

    @property
    def all_layers(self) -> range:
        """Indices of the target's layers."""
        return range(self.layers)

    @property
    def drafting(self) -> range:
        """Indices of the draft layers."""
        return range(self.layers - self.draft_layers, self.layers)

    @property
    def queries(self) -> int:
        """Total width of all query heads."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Total width of all key heads, equal to that of the value heads."""
        return self.kv_heads * self.head_dim

    @property
    def attention_weights(self) -> int:
        """Weights of the four attention projections of one layer."""
        return 2 * self.hidden * (self.queries + self.keys)

    @property
    def attention_parameters(self) -> int:
        """Parameters of one layer's attention: projections, their biases, query and key norms."""
        return self.attention_weights + self.attention_biases + self.query_norms

    @property
    def query_norms(self) -> int:
        """Parameters of one layer's query and key norms."""
        return {None: 0, "head": 2 * self.head_dim, "width": self.queries + self.keys}[self.family.query_norms]

    def ffn_parameters(self, layer: int) -> int:
        """Parameters of a layer's FFN: gate, up and down; in sparse layers, of all experts plus the router."""
        if self.sparse[layer]:
            return self.experts * (3 * self.expert_intermediate + 1) * self.hidden
        return 3 * self.hidden * self.intermediate + self.ffn_biases

    def ffn_weights(self, layer: int) -> int:
        """FFN weights of a layer used per token: dense FFN, or active experts plus router."""
        if self.sparse[layer]:
            return (3 * self.active * self.expert_intermediate + self.experts) * self.hidden
        return 3 * self.hidden * self.intermediate

    def weights(self, layers: Iterable[int]) -> int:
        """Weights of the given layers used per token."""
        return sum(self.attention_weights + self.ffn_weights(layer) for layer in layers)

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding matrix; the head has the same number."""
        return self.vocabulary * self.hidden

    @property
    def target_parameters(self) -> int:
        """Parameters of the target: embedding, layers, final norm, head unless tied."""
        matrices = 1 if self.tied else 2
        layer = self.attention_parameters + self.family.norms * self.hidden
        ffn = sum(self.ffn_parameters(n) for n in self.all_layers)
        return matrices * self.embedding_parameters + self.layers * layer + ffn + self.hidden

    @property
    def tuned_parameters(self) -> int:
        """Parameters that stage 1 trains: draft attention (or LoRA updates and norms), slot inputs."""
        layer = self.attention_parameters if self.updates is None else self.updates + self.query_norms
        return self.draft_layers * layer + self.slot_parameters

    @property
    def slot_parameters(self) -> int:
        """Parameters of the slot inputs: mask embedding, bonus slot."""
        return self.draft.parameters(self.hidden, self.vocabulary, ATTENTION_TUNING)

    @property
    def corrections(self) -> list[int]:
        """Ranks of the MLPs that correct the logits: calibrator and chain, if present."""
        return [rank for rank in (self.rank, self.chain_rank) if rank]

    @property
    def calibrator_parameters(self) -> int:
        """Parameters of the logit corrections (calibrator and chain): W1, b1, W2, b2 of each."""
        return self.draft.parameters(self.hidden, self.vocabulary, BONUS_CALIBRATION)

    def trains_layers(self, stage: str) -> bool:
        """Return whether a stage trains the draft layers and slot inputs."""
        return stage == ATTENTION_TUNING or self.joint

    def trained_parameters(self, stage: str) -> int:
        """Number of parameters trained in a stage."""
        tuned = self.tuned_parameters if self.trains_layers(stage) else 0
        return tuned + (self.calibrator_parameters if stage == BONUS_CALIBRATION else 0)

    def draft_parameters(self, stage: str) -> int:
        """Number of exported drafter parameters after a stage."""
        tuned = self.draft_layers * self.attention_parameters + self.slot_parameters
        return tuned + (self.calibrator_parameters if stage == BONUS_CALIBRATION else 0)

    def held_parameters(self, stage: str) -> int:
        """Number of drafter parameters held in memory during a stage."""
        return self.tuned_parameters if stage == ATTENTION_TUNING else self.draft_parameters(stage)


def _layer_sizes(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Return the sizes of attention and dense FFN as keyword arguments of `Sizes`."""
    hidden, intermediate, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    three = (heads + 2 * kv_heads) * head_dim
    biases = three if family.bias else three + hidden if config.get("attention_bias") else 0
    return {
        "hidden": hidden,
        "intermediate": intermediate,
        "layers": config["num_hidden_layers"],
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "attention_biases": biases,
        "ffn_biases": 2 * intermediate + hidden if config.get("mlp_bias") else 0,
    }


def _expert_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes and positions of sparse layers as keyword arguments of `Sizes`."""
    layers = config["num_hidden_layers"]
    # Key in config.json, or in transformers 5.
    experts = config.get("num_experts") or config.get("num_local_experts") or 0
    if not experts:
        return {"sparse": (False,) * layers, "experts": 0, "active": 0, "expert_intermediate": 0}
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    return {
        "sparse": tuple((n + 1) % step == 0 and n not in dense for n in range(layers)),
        "experts": experts,
        "active": config["num_experts_per_tok"],
        "expert_intermediate": config["moe_intermediate_size"],
    }


def _windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Return the window of each layer, following `models.families`."""
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    kinds = config.get("layer_types") or ["sliding_attention"] * config["num_hidden_layers"]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
