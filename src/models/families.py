"""Differences between architectures outside the decoder layers, and checks that a target is supported.

Decoder layers are reused unchanged, so norms, FFN or experts, projections, and partial or scaled RoPE need no special
handling. This module covers the computation *between* layers, which `attention.layers.run_layers` takes over from
the model.
"""

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from data.errors import out_of_memory

# Tested against transformers in tests/models/test_families.py. `decoding.check_untested` checks other families.
TESTED = ("gemma3_text", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "qwen3_moe")
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")  # RoPE types whose angles depend on the sequence length

# Config settings that change the model's computation in ways not implemented here.
_UNSUPPORTED = {
    "attn_logit_softcapping": "attention logit softcapping",
    "final_logit_softcapping": "final logit softcapping",
    "use_bidirectional_attention": "bidirectional attention",
}


def layer_kinds(config: PretrainedConfig) -> list[str]:
    """Return the attention type of each layer [N] as named by transformers, including unsupported types."""
    kinds = getattr(config, "layer_types", None)
    everywhere = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    return list(kinds or [everywhere] * config.num_hidden_layers)


def layer_windows(config: PretrainedConfig) -> list[int | None]:
    """Return the window size W of each layer [N], or None: a query at p attends only to key positions > p - W."""
    return [config.sliding_window if kind == "sliding_attention" else None for kind in layer_kinds(config)]


def position_embeddings(
    target: PreTrainedModel, hidden: Tensor, position_ids: Tensor, layers: range
) -> list[tuple[Tensor, Tensor]]:
    """Return the RoPE cos and sin, each [R, tokens, head size], for each of the given target layers.

    Gemma 3 uses a different RoPE base in sliding-window layers; such models key `rope_parameters` by layer type.
    """
    rotary = target.model.rotary_emb
    if not isinstance(next(iter(_rope(target.config).values()), None), dict):
        return [rotary(hidden, position_ids)] * len(layers)
    kinds = [layer_kinds(target.config)[i] for i in layers]
    embeddings = {kind: rotary(hidden, position_ids, kind) for kind in dict.fromkeys(kinds)}
    return [embeddings[kind] for kind in kinds]


def max_text_length(config: PretrainedConfig, block_size: int) -> int:
    """Return the maximum combined length of a prompt and its answer, in tokens.

    Candidates and the block after them may extend past the end of the text. This is harmless unless RoPE's angles
    depend on the sequence length: the extra positions could then change the angles of the text itself, so they must
    also fit below the length at which the angles start to change.
    """
    rope = _rope(config)
    kinds = [part for part in rope.values() if isinstance(part, dict)] or [rope]
    limits = [
        part.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
        for part in kinds
        if (part.get("rope_type") or part.get("type")) in LENGTH_DEPENDENT_ROPE
    ]
    constant = [int(limit) - 2 * block_size for limit in limits]
    return min([config.max_position_embeddings, *constant])


def check_trainable(config: PretrainedConfig) -> None:
    """Check that a drafter can be trained for the target.

    Raises:
        ValueError: the target's weights are quantized, so its projections cannot initialize the drafter's.
    """
    if getattr(config, "quantization_config", None):
        raise ValueError(
            "The target is quantized, but training initializes the drafter from unquantized projections. Train with "
            "the original, unquantized model; the drafter also works with the quantized one."
        )


def check_architecture(config: PretrainedConfig) -> None:
    """Check that an architecture is supported as a target, without loading weights.

    Raises:
        ValueError: the architecture is unsupported; the message lists the reasons.
    """
    missing = _missing_settings(config) or _missing_parts(config)
    if missing:
        raise ValueError(
            f"{config.model_type} is not supported as a target: it has {', '.join(missing)}. Tested families: "
            f"{', '.join(TESTED)}. docs/guide/families.md lists the requirements."
        )


def _missing_settings(config: PretrainedConfig) -> list[str]:
    if getattr(config, "is_encoder_decoder", False):
        return ["an encoder in addition to its decoder"]
    if getattr(config, "text_config", None) is not None:
        kind = getattr(config.text_config, "model_type", "language model")
        return [f"other modalities (save its {kind} as a separate model and use that)"]
    found = [what for name, what in _UNSUPPORTED.items() if getattr(config, name, None)]
    kinds = set(layer_kinds(config)) - {"full_attention", "sliding_attention"}
    return found + [f"layers of type {kind}" for kind in sorted(kinds)]


def _missing_parts(config: PretrainedConfig) -> list[str]:
    """Return the missing or unsupported modules of the model, which is instantiated on the meta device."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers raises many exception types for models it cannot build
        if out_of_memory(error):
            raise
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return [f"no causal language model in transformers ({text})"]
    inner = getattr(model, "model", None)
    found = [f"no model.{name}" for name in ("layers", "norm", "rotary_emb") if not hasattr(inner, name)]
    if found or inner is None:
        return found
    attention = [getattr(layer, "self_attn", None) for layer in inner.layers]
    if None in attention:
        return [f"no self_attn in layer {attention.index(None)}"]
    if any(hasattr(module, "sinks") for module in attention):
        found.append("attention sinks")
    return found


def _rope(config: PretrainedConfig) -> dict:
    return getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
