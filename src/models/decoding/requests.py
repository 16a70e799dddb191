"""Validation of the decoder's arguments before decoding starts."""

import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.attention.packed import NAME
from models.decoding.generation_settings import stop_tokens
from models.decoding.sampling import Sampling
from models.decoding.selection import Selection
from models.draft import DraftModel
from models.families import max_text_length
from models.target import vocabulary

SEEDS = range(-(2**63), 2**64)  # seeds that torch accepts


def check_models(target: PreTrainedModel, draft: DraftModel | None) -> None:
    """Check that `target` was loaded with `load_target`, and that `draft` is None or its drafter on the same device.

    Raises:
        ValueError: `target` is not a model with this project's attention, or `draft` is not a drafter, belongs to
            a different target or is on a different device.
    """
    if not isinstance(target, nn.Module):
        raise ValueError(f"target is a {type(target).__name__}; expected a model. Load it with load_target.")
    if target.config._attn_implementation != NAME:
        raise ValueError(
            f"The target has attn_implementation={target.config._attn_implementation!r}; expected {NAME!r}. "
            "Load it with load_target."
        )
    if draft is None:
        return
    if not isinstance(draft, DraftModel):
        raise ValueError(f"draft is a {type(draft).__name__}; expected a DraftModel or None. Load it with load_draft.")
    if draft.target is not target:
        raise ValueError("The drafter was loaded for a different target instance. Call load_draft with this target.")
    if draft.mask_embedding.device != target.device:
        raise ValueError(
            f"The drafter is on {draft.mask_embedding.device}, but its target is on {target.device}. Move both to "
            "the same device."
        )


def check_types(
    *, selection: Any, sampling: Any, calibrate: Any, timer: Any, streamers: Sequence[Any], tokenizer: Any, strings: Any
) -> None:
    """Check the types of the remaining arguments of `generate`.

    Raises:
        ValueError: an argument has the wrong type, or stop strings are given without a tokenizer.
    """
    if not isinstance(selection, Selection):
        raise ValueError(f'selection={selection!r}: expected a Selection, e.g. Selection("off").')
    if not isinstance(sampling, Sampling):
        raise ValueError(f"sampling={sampling!r}: expected a Sampling, e.g. Sampling(temperature=0.7).")
    if not isinstance(calibrate, bool):
        raise ValueError(f"calibrate={calibrate!r}: expected True or False.")
    if timer is not None and not callable(timer):
        raise ValueError(f"timer={timer!r}: expected a callable that takes a phase name.")
    for streamer in streamers:
        if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
            raise ValueError(f"streamer={streamer!r}: expected an object with put(ids) and end().")
    if strings and tokenizer is None:
        raise ValueError(f"stop_strings={strings!r} requires the target's tokenizer. Pass tokenizer=...")


def parse_integer(name: str, value: Any, least: int = 0) -> int:
    """Convert a value to an integer of at least `least`.

    Raises:
        ValueError: the value is not an integer, or is below `least`.
    """
    number = _index(value)
    if number is None or number < least:
        raise ValueError(f"{name}={value!r}: expected an integer of at least {least}.")
    return number


def _index(value: Any) -> int | None:
    """Return the value as an int, or None if it is not an integer. bool and float do not count as integers."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def parse_prompts(target: PreTrainedModel, input_ids: Any, attention_mask: Tensor | None) -> list[list[int]]:
    """Convert the prompts to lists of token ids without padding.

    Args:
        input_ids: a list of prompts, or [R, T] padded on either side.
        attention_mask: [R, T] for padded prompts. If None, it is inferred from the target's padding token, as in
            transformers.

    Raises:
        ValueError: the input has the wrong type, no prompts are given, a prompt is empty, a token id is out of range,
            or the mask has gaps or the wrong shape.
    """
    if isinstance(input_ids, Tensor):
        prompts = _without_padding(target, input_ids, attention_mask)
    elif attention_mask is not None:
        raise ValueError(
            "attention_mask applies only to a padded tensor, but the prompts are lists. Remove attention_mask."
        )
    else:
        prompts = _lists(input_ids)
    if not prompts:
        raise ValueError("input_ids is empty; expected at least one prompt.")
    known = vocabulary(target)
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"The prompt in row {row} is empty; expected at least one token.")
        if not 0 <= min(prompt) <= max(prompt) < known:
            raise ValueError(
                f"The prompt in row {row} contains token id {min(prompt) if min(prompt) < 0 else max(prompt)}; "
                f"token ids range from 0 to {known - 1}."
            )
    return prompts


def _lists(prompts: Any) -> list[list[int]]:
    """Convert an iterable of prompts to lists of token ids.

    Raises:
        ValueError: `prompts` is not an iterable of iterables of token ids.
    """
    if isinstance(prompts, (str, bytes)) or hasattr(prompts, "keys") or not hasattr(prompts, "__iter__"):
        raise ValueError(
            f"input_ids is a {type(prompts).__name__}; expected a list of prompts, each a list of token ids."
        )
    found = []
    for row, prompt in enumerate(prompts):
        if _index(prompt) is not None:
            raise ValueError("input_ids is a single prompt; expected a list of prompts, e.g. [input_ids].")
        if isinstance(prompt, (str, bytes)) or hasattr(prompt, "keys") or not hasattr(prompt, "__iter__"):
            raise ValueError(f"The prompt in row {row} is a {type(prompt).__name__}; expected a list of token ids.")
        values = list(prompt)
        tokens = [_index(value) for value in values]
        if None in tokens:
            wrong = values[tokens.index(None)]
            raise ValueError(f"The prompt in row {row} contains {wrong!r}; expected integer token ids.")
        found.append(cast(list[int], tokens))  # None is ruled out above
    return found


def _without_padding(target: PreTrainedModel, input_ids: Tensor, attention_mask: Any) -> list[list[int]]:
    """Remove the padding from prompts [R, T], using the given attention mask or an inferred one.

    Raises:
        ValueError: `input_ids` is not an integer tensor [R, T], or the mask has the wrong type or shape, has gaps or
            cannot be inferred.
    """
    if input_ids.dim() != 2 or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)} and dtype {input_ids.dtype}; expected integer "
            "token ids, [rows, tokens]."
        )
    if attention_mask is None:
        attention_mask = _inferred_mask(target, input_ids)
    if not isinstance(attention_mask, Tensor):
        raise ValueError(f"attention_mask is a {type(attention_mask).__name__}; expected a tensor [rows, tokens].")
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but input_ids has shape {tuple(input_ids.shape)}."
        )
    if not ((attention_mask == 0) | (attention_mask == 1)).all():
        raise ValueError("attention_mask contains values other than 0 (padding) and 1 (token).")
    mask = attention_mask.to(input_ids.device).bool()
    if (mask.int().diff(dim=1).abs().sum(1) > 1).any():
        raise ValueError(
            "attention_mask (given, or inferred from the padding token) has padding within a prompt or on both sides "
            "of it; expected padding on one side only."
        )
    return [row[kept].tolist() for row, kept in zip(input_ids, mask, strict=True)]


def _inferred_mask(target: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Infer the attention mask [R, T]: 0 at padding tokens.

    Return all ones if the target has no padding token, or if its padding token is a stop token, which may be part of a
    prompt.

    Raises:
        ValueError: there is no separate padding token, and in a batch of several rows, one begins or ends with a stop
            token.
    """
    pad, stop = target.generation_config.pad_token_id, stop_tokens(target)
    if pad is not None and pad not in stop:
        return (input_ids != pad).long()
    # A tokenizer without a separate padding token pads with a stop token.
    rows, length = input_ids.shape
    edges = input_ids[:, [0, -1]] if length else input_ids
    if rows > 1 and any(token in stop for token in edges.flatten().tolist()):
        raise ValueError(
            f"Some rows of input_ids begin or end with a stop token (one of {sorted(stop)}), which may be padding. "
            "Pass attention_mask, or pass the prompts as lists."
        )
    return torch.ones_like(input_ids)


def check_length(target: PreTrainedModel, draft: DraftModel | None, prompts: list[list[int]], new: int) -> None:
    """Check that each prompt and its new tokens fit into the target's context.

    Args:
        new: maximum number of new tokens per prompt.

    Raises:
        ValueError: a prompt and its new tokens exceed the length that the target supports.
    """
    limit = max_text_length(target.config, draft.block_size if draft else 0)
    for row, prompt in enumerate(prompts):
        if len(prompt) + new > limit:
            raise ValueError(
                f"The prompt in row {row} has {len(prompt)} tokens, {len(prompt) + new} with max_new_tokens={new}; the "
                f"target supports at most {limit}. Shorten the prompt or reduce max_new_tokens."
            )


def parse_stop_tokens(target: PreTrainedModel, stop: Any) -> set[int]:
    """Convert `stop` to a set of token ids.

    Raises:
        ValueError: `stop` is not an iterable of the target's token ids.
    """
    known = vocabulary(target)
    iterable = hasattr(stop, "__iter__") and not isinstance(stop, (str, bytes)) and not hasattr(stop, "keys")
    tokens = [_index(token) for token in stop] if iterable else [None]
    if any(token is None or not 0 <= token < known for token in tokens):
        raise ValueError(f"stop={stop!r}: expected a set of token ids from 0 to {known - 1}, e.g. {{2}}.")
    return cast(set[int], set(tokens))  # None is ruled out above


def parse_seeds(seed: Any, rows: int) -> list[int]:
    """Return one seed per row. With a single seed, row i gets `seed + i`.

    Raises:
        ValueError: the seed is neither an integer nor a list with one integer per row, or is out of torch's range.
    """
    if isinstance(seed, (list, tuple)):
        seeds = [_index(one) for one in seed]
        if len(seeds) != rows:
            raise ValueError(
                f"seed: got {len(seeds)} for {rows} prompts; expected one per prompt, or a single integer."
            )
    else:
        first = _index(seed)
        seeds = [None if first is None else first + row for row in range(rows)]
    if any(one is None or one not in SEEDS for one in seeds):
        raise ValueError(f"seed={seed!r}: expected an integer from -2^63 to 2^64 - 1, or a list with one per prompt.")
    return cast(list[int], seeds)  # None is ruled out above


def functions_by_row(name: str, given: Any, rows: int) -> list[list[Callable]] | None:
    """Return the processors or criteria for each row, or None if there are none.

    Raises:
        ValueError: a single list is given for several prompts, or there is not one list of functions per prompt.
    """
    if given is None or (isinstance(given, (list, tuple)) and not given):
        return None
    expected = f"{name}: expected a list of functions for a single prompt, or a list of such lists, one per prompt"
    if not isinstance(given, (list, tuple)):
        raise ValueError(f"{expected}, not a {type(given).__name__}.")
    lists = [part is None or isinstance(part, (list, tuple)) for part in given]
    if not any(lists):
        if rows > 1:
            raise ValueError(
                f"{expected}. Rows are decoded independently, so functions that keep state or depend on the row need "
                f"one list per prompt; otherwise, pass [{name}] * {rows}."
            )
        given, lists = [given], [True]
    if not all(lists):
        raise ValueError(f"{expected}; got lists and functions mixed.")
    if len(given) != rows:
        raise ValueError(f"{expected}; got {len(given)} for {rows} prompts.")
    found = [list(part or []) for part in given]
    wrong = [function for part in found for function in part if not callable(function)]
    if wrong:
        raise ValueError(f"{expected}; {wrong[0]!r} is not callable.")
    return found if any(found) else None


def parse_streamers(streamer: Any, rows: int) -> list[Any]:
    """Return one streamer or None per row.

    Raises:
        ValueError: the number of streamers differs from the number of prompts.
    """
    if streamer is None:
        return [None] * rows
    streamers = list(streamer) if isinstance(streamer, (list, tuple)) else [streamer]
    if len(streamers) != rows:
        raise ValueError(
            f"streamer: got {len(streamers)} for {rows} prompts. Rows advance at different speeds, so pass a list with "
            "one streamer, or None, per prompt."
        )
    return streamers


def parse_strings(strings: Any) -> list[str]:
    """Return the stop strings as a list.

    Raises:
        ValueError: `strings` is neither a non-empty string nor a list of non-empty strings.
    """
    found = [strings] if isinstance(strings, str) else [] if strings is None else strings
    if not isinstance(found, (list, tuple, set)) or not all(isinstance(string, str) and string for string in found):
        raise ValueError(f"stop_strings={strings!r}: expected a non-empty string or a list of non-empty strings.")
    return list(found)
