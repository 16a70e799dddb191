"""What architectures differ in around their decoder layers, and which of them can be targets.

Layers are taken as they are, so most of an architecture needs no word here: norms, FFN or experts, projectors, partial
or scaled RoPE. What the model does *between* its layers is done by `execution.through_layers` instead, and is what this
file knows.
"""

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from data.errors import out_of_memory

# Held against transformers' own model in tests/models/test_families.py. For others there is `decoding.check_untested`.
TESTED = ("gemma3_text", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "qwen3_moe")
CHANGING = ("dynamic", "longrope")  # kinds of RoPE whose angles depend on how long the text is

# Settings of a config that change what a model computes, in ways that nothing here follows.
_UNKNOWN = {
    "attn_logit_softcapping": "capped attention scores",
    "final_logit_softcapping": "capped logits",
    "use_bidirectional_attention": "bidirectional attention",
}


def layer_kinds(config: PretrainedConfig) -> list[str]:
    """[N] `full_attention` or `sliding_attention`, as transformers names them; others are refused."""
    kinds = getattr(config, "layer_types", None)
    everywhere = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    return list(kinds or [everywhere] * config.num_hidden_layers)


def layer_windows(config: PretrainedConfig) -> list[int | None]:
    """[N] the window W of each layer: a query at position p sees keys at positions > p - W; None: no window."""
    return [config.sliding_window if kind == "sliding_attention" else None for kind in layer_kinds(config)]


def position_embeddings(
    target: PreTrainedModel, hidden: Tensor, position_ids: Tensor, layers: range
) -> list[tuple[Tensor, Tensor]]:
    """RoPE's cos and sin, [R, tokens, head size] each, for each of some layers of the target.

    Gemma 3 has another base where it has a window; such models keep `rope_parameters` by kind of layer.
    """
    rotary = target.model.rotary_emb
    if not isinstance(next(iter(_rope(target.config).values()), None), dict):
        return [rotary(hidden, position_ids)] * len(layers)
    kinds = [layer_kinds(target.config)[i] for i in layers]
    embeddings = {kind: rotary(hidden, position_ids, kind) for kind in dict.fromkeys(kinds)}
    return [embeddings[kind] for kind in kinds]


def text_positions(config: PretrainedConfig, block_size: int) -> int:
    """How many tokens a text may have, an answer included, beside which blocks are drafted.

    Candidates and a block after them may lie behind its end. That does no harm, but where RoPE's angles change with the
    length: there they would change those of the text itself, so they have to stay within the length before that.
    """
    rope = _rope(config)
    kinds = [part for part in rope.values() if isinstance(part, dict)] or [rope]
    limits = [
        part.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
        for part in kinds
        if (part.get("rope_type") or part.get("type")) in CHANGING
    ]
    constant = [int(limit) - 2 * block_size for limit in limits]
    return min([config.max_position_embeddings, *constant])


def check_trainable(config: PretrainedConfig) -> None:
    """
    Raises:
        ValueError: the target's weights are quantized, and a drafter starts from its projectors.
    """
    if getattr(config, "quantization_config", None):
        raise ValueError(
            "The target is quantized; training starts from its projectors, and needs them unquantized. Name the model "
            "that it was made from: the drafter fits the quantized one too."
        )


def check_architecture(config: PretrainedConfig) -> None:
    """What can be known of an architecture without its weights.

    Raises:
        ValueError: it cannot be a target, with all that is missing.
    """
    missing = _missing_settings(config) or _missing_parts(config)
    if missing:
        raise ValueError(
            f"{config.model_type} cannot be a target: it has {', '.join(missing)}. Tested families: "
            f"{', '.join(TESTED)}; docs/guide/families.md says what a family needs."
        )


def _missing_settings(config: PretrainedConfig) -> list[str]:
    if getattr(config, "is_encoder_decoder", False):
        return ["an encoder beside its decoder"]
    if getattr(config, "text_config", None) is not None:
        kind = getattr(config.text_config, "model_type", "language model")
        return [f"more than a language model (save its {kind} alone, and name that)"]
    found = [what for name, what in _UNKNOWN.items() if getattr(config, name, None)]
    kinds = set(layer_kinds(config)) - {"full_attention", "sliding_attention"}
    return found + [f"layers of kind {kind}" for kind in sorted(kinds)]


def _missing_parts(config: PretrainedConfig) -> list[str]:
    """Looked for in the model itself, built without memory for its weights."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers raises many kinds for models that it cannot build
        if out_of_memory(error):
            raise
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return [f"no causal language model that transformers can build ({text})"]
    inner = getattr(model, "model", None)
    found = [f"no model.{name}" for name in ("layers", "norm", "rotary_emb") if not hasattr(inner, name)]
    if found:
        return found
    attention = [getattr(layer, "self_attn", None) for layer in inner.layers]
    if None in attention:
        return [f"no self_attn in layer {attention.index(None)}"]
    if any(hasattr(module, "sinks") for module in attention):
        found.append("attention sinks")
    return found


def _rope(config: PretrainedConfig) -> dict:
    return getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
