"""The frozen target: loading it, and running it once over clean tokens."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from models.masks import document_causal_mask


def load_target(
    name: str | None,
    *,
    revision: str | None = None,
    architecture: dict[str, Any] | None = None,
    dtype: str = "float32",
    attn_implementation: str = "sdpa",
) -> PreTrainedModel:
    """The target, frozen and in evaluation mode.

    Args:
        name: directory or Hub id; None for a model with random weights.
        architecture: for random weights, the model's config (`model_type` and sizes).
        dtype: of weights and activations, e.g. `bfloat16`.

    Raises:
        ValueError: not exactly one of `name` and `architecture`, or no such dtype.
        OSError: no such directory or Hub id.
    """
    torch_dtype = getattr(torch, dtype, None)
    if not isinstance(torch_dtype, torch.dtype):
        raise ValueError(f"dtype={dtype!r} is no torch dtype; expected float32, bfloat16 or float64.")
    if (name is None) == (architecture is None):
        raise ValueError(
            f"Give either the target's name or an architecture for random weights, not {name!r} and {architecture!r}."
        )
    if name is not None:
        target = AutoModelForCausalLM.from_pretrained(
            name, revision=revision, dtype=torch_dtype, attn_implementation=attn_implementation
        )
    else:
        config = AutoConfig.for_model(**architecture)
        target = AutoModelForCausalLM.from_config(config, dtype=torch_dtype, attn_implementation=attn_implementation)
    return target.requires_grad_(False).eval()


def load_config(name: str | None, *, revision: str | None = None, architecture: dict[str, Any] | None = None):
    """The target's config alone, cheap enough to check the settings against before any weight is read."""
    if name is None:
        return AutoConfig.for_model(**(architecture or {}))
    return AutoConfig.from_pretrained(name, revision=revision)


def load_tokenizer(name: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The target's tokenizer."""
    return AutoTokenizer.from_pretrained(name, revision=revision)


class ContextCache:
    """Clean K/V of the draft layers, put in front of the mask tokens' own K/V.

    A draft layer takes it in the place of a cache: `update` returns context and block, and stores nothing, so the same
    context serves any number of blocks.
    """

    def __init__(self, keys: dict[int, Tensor], values: dict[int, Tensor]) -> None:
        self.keys = keys  # target layer -> [R, key/value heads, T, head size]
        self.values = values

    @classmethod
    def from_cache(cls, cache: DynamicCache, first_layer: int) -> "ContextCache":
        """The layers from `first_layer` on of a cache that the target has filled, by reference."""
        layers = range(first_layer, len(cache.layers))
        return cls({i: cache.layers[i].keys for i in layers}, {i: cache.layers[i].values for i in layers})

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Called by the attention modules of transformers with the block's own keys and values."""
        return torch.cat([self.keys[layer_idx], keys], 2), torch.cat([self.values[layer_idx], values], 2)


@dataclass
class TargetOutput:
    """What one pass of the target over clean tokens leaves for the draft."""

    context: ContextCache  # K/V of the draft layers
    hidden: Tensor  # [R, T, H] after the final norm


@torch.no_grad()
def target_pass(
    target: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, document_ids: Tensor, first_layer: int
) -> TargetOutput:
    """Run the unmodified target over packed rows, each document on its own. Arguments are [R, T], as in `Batch`."""
    cache = DynamicCache()
    output = target.model(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=document_causal_mask(document_ids),
        past_key_values=cache,
        use_cache=True,
    )
    return TargetOutput(ContextCache.from_cache(cache, first_layer), output.last_hidden_state)


@torch.no_grad()
def bonus_tokens(target: PreTrainedModel, hidden: Tensor, anchors: Tensor) -> Tensor:
    """[R, A] the token that the target itself would put at each anchor: its greedy prediction one token before.

    `hidden` [R, T, H] is the target's, after the final norm; anchors are >= 1 (an anchor of 0 marks an unused place).
    """
    before = (anchors - 1).clamp(min=0)  # [R, A]
    at_anchor = hidden.gather(1, before[..., None].expand(-1, -1, hidden.shape[-1]))
    return target.get_output_embeddings()(at_anchor).argmax(-1)
