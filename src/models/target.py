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

from data.batch import Batch
from models.attention import NAME, KeysValues, View, clean_mask
from models.execution import EAGER, Execution, through_layers
from models.families import layer_windows
from models.hf_cache import keys_values
from models.masks import per_window


def load_target(
    name: str | None,
    *,
    revision: str | None = None,
    architecture: dict[str, Any] | None = None,
    dtype: str | torch.dtype = "float32",
    **options: Any,
) -> PreTrainedModel:
    """The target, frozen and in evaluation mode.

    Args:
        name: directory or Hub id; None for a model with random weights.
        architecture: for random weights, the model's config (`model_type` and sizes).
        dtype: of weights and activations, e.g. `bfloat16`.
        options: of transformers' `from_pretrained`, such as `quantization_config`.

    Raises:
        ValueError: not exactly one of `name` and `architecture`, or no such dtype.
        OSError: no such directory or Hub id.
    """
    torch_dtype = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)
    if not isinstance(torch_dtype, torch.dtype):
        raise ValueError(f"dtype={dtype!r} is no torch dtype; expected float32, bfloat16 or float64.")
    if (name is None) == (architecture is None):
        raise ValueError(
            f"Give either the target's name or an architecture for random weights, not {name!r} and {architecture!r}."
        )
    if name is not None:
        target = AutoModelForCausalLM.from_pretrained(
            name, revision=revision, dtype=torch_dtype, attn_implementation=NAME, **options
        )
    else:
        config = AutoConfig.for_model(**architecture)
        target = AutoModelForCausalLM.from_config(config, dtype=torch_dtype, attn_implementation=NAME)
    return target.requires_grad_(False).eval()


def load_config(name: str | None, *, revision: str | None = None, architecture: dict[str, Any] | None = None):
    """The target's config alone, cheap enough to check the settings against before any weight is read."""
    if name is None:
        return AutoConfig.for_model(**(architecture or {}))
    return AutoConfig.from_pretrained(name, revision=revision)


def load_tokenizer(name: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The target's tokenizer."""
    return AutoTokenizer.from_pretrained(name, revision=revision)


Context = list[KeysValues]  # K/V of the clean tokens, one pair for each draft layer


def cached_context(cache: DynamicCache, first_layer: int) -> Context:
    """The layers from `first_layer` on of a cache that the target has filled, by reference."""
    return [keys_values(cache, number) for number in range(first_layer, len(cache.layers))]


def clean_views(target: PreTrainedModel, document_ids: Tensor, kind: str) -> list[View]:
    """[N] what clean tokens see in each layer of the target. [R, T]"""
    windows = layer_windows(target.config)
    masks = per_window(windows, lambda window: clean_mask(document_ids, kind, window))
    return [View(mask, window=window) for mask, window in zip(masks, windows, strict=True)]


@dataclass
class TargetOutput:
    """What one pass of the target over clean tokens leaves for the draft."""

    context: Context
    hidden: Tensor | None  # [R, T, H] after the final norm, if it was asked for


@torch.no_grad()
def target_pass(
    target: PreTrainedModel,
    batch: Batch,
    first_layer: int,
    *,
    with_hidden: bool = True,
    execution: Execution = EAGER,
) -> TargetOutput:
    """Run the target's layers over packed rows, each document on its own.

    Nothing is computed that nobody reads: keys and values are kept of the layers from `first_layer` on, and without
    `with_hidden` the last layer ends with its own.
    """
    layers = target.model.layers
    views = clean_views(target, batch.document_ids, execution.attention)
    for view in views[first_layer:]:
        view.keep = True
    views[-1].stop = not with_hidden
    embed = target.get_input_embeddings()  # called in place: a name would hold on to the embeddings to the end
    hidden = through_layers(target, layers, 0, embed(batch.input_ids), batch.position_ids, views, execution)
    return TargetOutput([view.kept for view in views[first_layer:]], target.model.norm(hidden) if with_hidden else None)


@torch.no_grad()
def bonus_tokens(target: PreTrainedModel, hidden: Tensor, anchors: Tensor) -> Tensor:
    """[R, A] the token that the target itself would put at each anchor: its greedy prediction one token before.

    `hidden` [R, T, H] is the target's, after the final norm; anchors are >= 1 (an anchor of 0 marks an unused place).
    """
    before = (anchors - 1).clamp(min=0)  # [R, A]
    at_anchor = hidden.gather(1, before[..., None].expand(-1, -1, hidden.shape[-1]))
    return target.get_output_embeddings()(at_anchor).argmax(-1)
