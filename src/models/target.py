"""Loads the frozen target and runs its forward pass over clean tokens."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

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
from models.artifact import CONFIG, draft_settings, read_object
from models.attention.layers import EAGER, Execution, run_layers
from models.attention.masks import per_window
from models.attention.packed import NAME, KeysValues, View, clean_mask
from models.families import layer_windows
from models.hf_cache import keys_values
from models.readable import CONFIG_FILES, MODEL_FILES, TOKENIZER_FILES, reading, weight_files


def load_target(
    name: str | Path | None,
    *,
    revision: str | None = None,
    architecture: dict[str, Any] | None = None,
    dtype: str | torch.dtype = "float32",
    **options: Any,
) -> PreTrainedModel:
    """Load the target, frozen and in evaluation mode.

    Args:
        name: directory or Hub id; None for random weights.
        architecture: config for a randomly initialized model (`model_type` and sizes).
        dtype: dtype of weights and activations, e.g. `bfloat16` or `torch.bfloat16`; `auto`: the stored dtype.
        options: further arguments to transformers' `from_pretrained`, e.g. `quantization_config` or a `device_map` with
            a single device. Quantized targets are supported for decoding but not for training.

    Raises:
        ValueError: `name` and `architecture` are both given or both None, the dtype is not a floating-point dtype, an
            option requires a pretrained model, `name` is an exported drafter, weights are missing or do not match the
            config, or the device map spans several devices.
        OSError: the directory or Hub id does not exist or has no weights.
    """
    torch_dtype = _resolve_dtype(dtype)
    if (name is None) == (architecture is None):
        raise ValueError(
            f"name={name!r}, architecture={architecture!r}: expected exactly one of them: the name of a "
            "pretrained model, or an architecture for random weights."
        )
    if architecture is not None:
        if options or torch_dtype == "auto":
            refused = [*options, *(["dtype='auto'"] if torch_dtype == "auto" else [])]
            raise ValueError(
                f"{', '.join(refused)}: not supported for random weights, which have no checkpoint. Pass only an "
                "explicit dtype, or the name of a pretrained model."
            )
        config = AutoConfig.for_model(**architecture)
        target = AutoModelForCausalLM.from_config(config, dtype=torch_dtype, attn_implementation=NAME)
        return target.requires_grad_(False).eval()
    target = _load_pretrained(str(name), revision=revision, dtype=torch_dtype, **options)
    devices = {str(parameter.device) for parameter in target.parameters()}
    if len(devices) > 1:
        raise ValueError(
            f"device_map={options.get('device_map')!r} splits the target across {', '.join(sorted(devices))}; drafting "
            "requires a single device. Pass e.g. device_map='cuda:0', and quantize the target if it does not fit."
        )
    return target.requires_grad_(False).eval()


def _resolve_dtype(dtype: Any) -> torch.dtype | str:
    """Resolve a dtype or dtype name to a floating-point `torch.dtype`; `auto` is returned as is.

    Raises:
        ValueError: the value is neither a floating-point dtype, nor the name of one, nor `auto`.
    """
    if dtype == "auto":
        return dtype
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(
            f"dtype={dtype!r}: expected auto or a floating-point dtype, e.g. float32, bfloat16 or float16."
        )
    return found


def _load_pretrained(name: str, **settings: Any) -> PreTrainedModel:
    """Load a pretrained model and check that no weights are missing.

    Raises:
        ValueError: `name` is an exported drafter, or weights are missing, damaged or do not match the config.
        OSError: the directory or Hub id does not exist or has no weights.
    """
    if draft_settings(read_object(Path(name) / CONFIG)) is not None:
        raise ValueError(
            f"{name} is an exported drafter, not a target. Load its target instead; load the drafter with load_draft."
        )
    with reading(name, "target", (*MODEL_FILES, *weight_files(Path(name)))):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, attn_implementation=NAME, output_loading_info=True, **settings
        )
    target, found = loaded  # a pair because of `output_loading_info`, contrary to its annotation
    # transformers initializes missing tensors randomly. Quantized models store theirs under different names.
    missing = sorted(found["missing_keys"])
    if missing and getattr(target.config, "quantization_config", None) is None:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise ValueError(
            f"{name}: the target's weights are missing {', '.join(missing[:4])}{more}. Download the target again."
        )
    return target


def load_config(name: str | None, *, revision: str | None = None, architecture: dict[str, Any] | None = None):
    """Load only the target's config, to check settings before any weights are read.

    Raises:
        ValueError: the config is damaged or unknown to transformers.
        OSError: the directory or Hub id does not exist.
    """
    if name is None:
        return AutoConfig.for_model(**(architecture or {}))
    with reading(name, "target's config", CONFIG_FILES):
        return AutoConfig.from_pretrained(name, revision=revision)


def load_tokenizer(name: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the target's tokenizer.

    Raises:
        ValueError: a file is damaged.
        OSError: the directory or Hub id does not exist or has no tokenizer.
    """
    with reading(name, "tokenizer", TOKENIZER_FILES):
        return AutoTokenizer.from_pretrained(name, revision=revision)


def vocabulary(target: PreTrainedModel) -> int:
    """Return the vocabulary size: the number of input embeddings, even if the target is quantized or has adapters."""
    embeddings = target.get_input_embeddings()
    for module in embeddings.modules():  # an adapter contains the layer it wraps
        if isinstance(size := getattr(module, "num_embeddings", None), int):
            return size
    return cast(Tensor, embeddings.weight).shape[0]


Context = list[KeysValues]  # K/V of the clean tokens, one pair per draft layer


def cached_context(cache: DynamicCache, first_layer: int) -> Context:
    """Return the K/V of layers `first_layer` and up from a cache filled by the target, without copying them."""
    return [keys_values(cache, number) for number in range(first_layer, len(cache.layers))]


def clean_views(target: PreTrainedModel, document_ids: Tensor, kind: str) -> list[View]:
    """Return the attention views for clean tokens, one per target layer [N]. document_ids is [R, T]."""
    windows = layer_windows(target.config)
    masks = per_window(windows, lambda window: clean_mask(document_ids, kind, window))
    return [View(mask, window=window) for mask, window in zip(masks, windows, strict=True)]


@dataclass
class TargetOutput:
    """The parts of the target's output for clean tokens that the drafter uses."""

    context: Context
    hidden: Tensor | None  # [R, T, H] after the final norm; None if not requested


@torch.no_grad()
def target_pass(
    target: PreTrainedModel,
    batch: Batch,
    first_layer: int,
    *,
    with_hidden: bool = True,
    execution: Execution = EAGER,
) -> TargetOutput:
    """Run the target's layers over packed rows; tokens attend only within their document.

    Keeps the keys and values of layers `first_layer` and up. Without `with_hidden`, the last layer stops once its keys
    and values are computed, since nothing else is needed from it.
    """
    layers = target.model.layers
    views = clean_views(target, batch.document_ids, execution.attention)
    for view in views[first_layer:]:
        view.keep = True
    views[-1].stop = not with_hidden
    # Embed inside the call: a local variable would keep the embeddings alive until the function returns.
    embed = target.get_input_embeddings()
    hidden = run_layers(target, layers, 0, embed(batch.input_ids), batch.position_ids, views, execution)
    context = [cast(KeysValues, view.kept) for view in views[first_layer:]]  # not None: `keep` is set
    return TargetOutput(context, target.model.norm(hidden) if with_hidden else None)


@torch.no_grad()
def bonus_tokens(target: PreTrainedModel, hidden: Tensor, anchors: Tensor) -> Tensor:
    """Return the target's greedy prediction for each anchor position [R, A].

    `hidden` [R, T, H] is the target's output after the final norm. Each anchor is predicted from the preceding token,
    so anchors are >= 1 (0 marks an unused anchor).
    """
    before = (anchors - 1).clamp(min=0)  # [R, A]
    at_anchor = hidden.gather(1, before[..., None].expand(-1, -1, hidden.shape[-1]))
    return target.get_output_embeddings()(at_anchor).argmax(-1)
