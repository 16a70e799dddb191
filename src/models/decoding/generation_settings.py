"""Logits processors and stopping criteria of the target's own `generate`.

The reference is `target.generate` in transformers, called on one prompt at a time with the same greedy or sampling
settings. Logits processors (penalties, bans, forced tokens) come from `target.generation_config` and are built
by transformers itself, so their semantics are identical.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)

Processor = Callable[[Tensor, Tensor], Tensor]  # (ids [1, tokens], scores [1, V]) -> scores [1, V]
Criterion = Callable[[Tensor, None], Any]  # (ids [1, tokens], None) -> whether the sequence ends

# Supported settings: each becomes a logits processor, a stopping criterion or a stop token.
SUPPORTED = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "eos_token_id",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "max_time",
    "min_length",
    "min_new_tokens",
    "no_repeat_ngram_size",
    "remove_invalid_values",
    "renormalize_logits",
    "repetition_penalty",
    "sequence_bias",
    "stop_strings",
    "suppress_tokens",
)
# Set by arguments of the decoder, which override the target's defaults.
OVERRIDDEN = (
    "do_sample",
    "epsilon_cutoff",
    "eta_cutoff",
    "max_length",
    "max_new_tokens",
    "min_p",
    "temperature",
    "top_h",
    "top_k",
    "top_p",
    "typical_p",
)
# Speed-up methods that do not change the tokens.
SPEEDUPS = (
    "assistant_confidence_threshold",
    "assistant_early_exit",
    "assistant_ensemble_weight",
    "assistant_lookbehind",
    "is_assistant",
    "max_matching_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "prompt_lookup_num_tokens",
    "speculation_type",
    "target_lookbehind",
    "use_mtp",
)
IGNORED = (
    "_from_model_config",
    "bos_token_id",
    "cache_config",
    "cache_implementation",
    "compile_config",
    "continuous_batching_config",
    "decoder_start_token_id",
    "disable_compile",
    "diversity_penalty",  # beam search only, like the next two
    "early_stopping",
    "length_penalty",
    "low_memory",
    "max_cache_len",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "pad_token_id",
    "prefill_chunk_size",
    "return_dict_in_generate",
    "return_legacy_cache",
    "transformers_version",
    "use_cache",
)
# Values that disable a setting, in addition to transformers' own defaults.
OFF = {"guidance_scale": 1, "penalty_alpha": 0, "min_new_tokens": 0}
LOSSY = {"cache_implementation": ("quantized",)}  # values of settings in IGNORED that do change the output


def stop_tokens(target: PreTrainedModel) -> set[int]:
    """Return the stop token ids that the target's own `generate` uses."""
    stop = target.generation_config.eos_token_id
    return set() if stop is None else set(torch.as_tensor(stop).flatten().tolist())


def check_generation_config(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Check that decoding supports the target's `generation_config`.

    Raises:
        ValueError: a setting cannot be applied token by token, or stop strings are set but no tokenizer is given.
    """
    config = target.generation_config.to_dict()
    followed = {*SUPPORTED, *OVERRIDDEN, *SPEEDUPS, *IGNORED}
    # Settings unknown to transformers are skipped: its `generate` ignores them as well.
    found = [name for name, off in _defaults().items() if name not in followed and _has_effect(config.get(name), off)]
    found += [name for name, values in LOSSY.items() if config.get(name) in values]
    if found:
        raise ValueError(
            f"The target's generation_config sets {', '.join(f'{name}={config[name]!r}' for name in sorted(found))}, "
            f"which drafting does not support. Set {'it' if len(found) == 1 else 'them'} to None in "
            "target.generation_config or in the target's generation_config.json."
        )
    if config.get("stop_strings") and tokenizer is None:
        raise ValueError(
            f"The target's generation_config sets stop_strings={config['stop_strings']!r}, which requires a tokenizer. "
            "Pass tokenizer=..., or set stop_strings to None in target.generation_config."
        )


def active_settings(target: PreTrainedModel) -> dict[str, Any]:
    """Return the settings in the target's `generation_config` that change the output, except stop tokens."""
    config = target.generation_config.to_dict()
    names = [name for name in SUPPORTED if name != "eos_token_id"]
    return {name: config[name] for name in names if _has_effect(config.get(name), _defaults().get(name))}


def _defaults() -> dict[str, Any]:
    """Return the settings known to transformers, each with the value that has no effect."""
    # Since transformers 5, a new config holds None, and `generate` fills in the defaults.
    filled_in: dict[str, Any] = getattr(GenerationConfig, "_get_default_generation_params", dict)()
    known = GenerationConfig().to_dict()
    return known | {name: value for name, value in filled_in.items() if name in known} | OFF


def _has_effect(value: Any, default: Any) -> bool:
    """Return whether a setting has an effect. None and False disable any setting; 0 and 1 are ordinary values."""
    return value is not None and value is not False and value != default


class SequenceState:
    """The tokens, logits processors and stopping criteria of one row.

    Processors and criteria are called once per new token, in order, as in transformers' `generate`, so they may be
    stateful.
    """

    def __init__(
        self,
        prompt: list[int],
        max_new_tokens: int,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        device: torch.device,
    ) -> None:
        """
        Args:
            device: device of ids and scores.
        """
        self.ids = torch.zeros(1, len(prompt) + max_new_tokens, dtype=torch.long, device=device)
        self.ids[0, : len(prompt)] = torch.tensor(prompt, device=device)
        self.new_tokens = 0
        self.limit = max_new_tokens  # maximum number of new tokens; lowered once a criterion ends the sequence
        self._prompt_length, self._criteria = len(prompt), criteria
        self._processors = cast(Processor, processors)  # annotated with LongTensor and FloatTensor, which are not types

    @property
    def _so_far(self) -> Tensor:
        return self.ids[:, : self._prompt_length + self.new_tokens]

    def scores(self, logits: Tensor) -> Tensor:
        """Apply the logits processors to the target's logits [V]. Return the next token's scores, float32 [V].

        Raises:
            ValueError: a processor returned scores of a different shape.
        """
        scores = self._processors(self._so_far, logits[None].to(torch.float32, copy=True))
        if scores.shape != (1, len(logits)):
            raise ValueError(
                f"A logits processor returned scores of shape {tuple(scores.shape)}; expected {(1, len(logits))}."
            )
        return scores[0]

    def add(self, token: int) -> bool:
        """Append a token. Return whether the sequence ends with it, by length or by a stopping criterion."""
        self.ids[0, self._prompt_length + self.new_tokens] = token
        self.new_tokens += 1
        if self._criteria and bool(torch.as_tensor(self._criteria(self._so_far, None)).all()):
            self.limit = self.new_tokens
        return self.new_tokens == self.limit

    def ends_with_stop_string(self) -> bool:
        """Return whether the last token completes a stop string."""
        strings = (criterion for criterion in self._criteria if isinstance(criterion, StopStringCriteria))
        return any(bool(criterion(self._so_far, None).all()) for criterion in strings)  # type: ignore[arg-type]


def sequence_states(
    target: PreTrainedModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop: set[int],
    *,
    processors: Sequence[Sequence[Processor] | None] | None = None,
    criteria: Sequence[Sequence[Criterion] | None] | None = None,
    stop_strings: Sequence[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[SequenceState] | None:
    """Create one sequence state per prompt.

    Return None if there are no logits processors and only stop tokens and the length limit end a sequence.

    Args:
        stop: stop token ids, passed to transformers as `eos_token_id`.
        processors, criteria: one list or None per row, in addition to the target's own.
        stop_strings: in addition to those of the target's `generation_config`.

    Raises:
        ValueError: unsupported settings, or settings that transformers rejects.
    """
    ends = _stop_strings(target, tokenizer, stop_strings)
    found = []
    for row, prompt in enumerate(prompts):
        row_processors = list(processors[row] or []) if processors else []
        row_criteria = ends + (list(criteria[row] or []) if criteria else [])
        prepared = _prepared(target, prompt, max_new_tokens, stop, row_processors, row_criteria)
        if row == 0 and not processors and not criteria and not any(prepared):
            return None  # all rows have the same settings
        found.append(SequenceState(prompt, max_new_tokens, *prepared, target.device))
    return found


def sequence_state(
    target: PreTrainedModel, prompt: list[int], max_new_tokens: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> SequenceState:
    """Create the sequence state for one prompt, with the target's own settings.

    Args:
        tokenizer: the target's tokenizer; required if its `generation_config` has stop strings.

    Raises:
        ValueError: unsupported settings, or settings that transformers rejects.
    """
    ends = _stop_strings(target, tokenizer)
    prepared = _prepared(target, prompt, max_new_tokens, stop_tokens(target), [], ends)
    return SequenceState(prompt, max_new_tokens, *prepared, target.device)


def _stop_strings(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, others: Sequence[str] = ()
) -> list[Criterion]:
    """Return one criterion for the target's stop strings and `others`, as a list that is empty if there are none.

    Raises:
        ValueError: unsupported settings, or stop strings without a tokenizer.
    """
    check_generation_config(target, tokenizer)
    own = target.generation_config.stop_strings or []
    strings = [*([own] if isinstance(own, str) else own), *others]
    if not strings:
        return []
    assert tokenizer is not None  # `check_generation_config` and `requests.check_types` require it with stop strings
    return [StopStringCriteria(tokenizer, strings)]


def _prepared(
    target: PreTrainedModel,
    prompt: list[int],
    max_new_tokens: int,
    stop: set[int],
    processors: list[Processor],
    criteria: list[Criterion],
) -> tuple[LogitsProcessorList, StoppingCriteriaList]:
    """Return the processors and criteria that transformers' `generate` prepares for one prompt.

    Sampling warpers and the criteria for stop tokens and length are excluded.

    Raises:
        ValueError: transformers rejects the settings.
    """
    prepared = []

    def keep(model, input_ids, logits_processor, stopping_criteria, **_):
        others = [c for c in stopping_criteria if not isinstance(c, (EosTokenCriteria, MaxLengthCriteria))]
        prepared.extend([logits_processor, StoppingCriteriaList(others)])
        return input_ids

    ids = torch.tensor([prompt], device=target.device)
    known = GenerationConfig().to_dict()
    unset = dict.fromkeys([name for name in (*OVERRIDDEN, *SPEEDUPS, "stop_strings") if name in known])
    settings = unset | {
        "do_sample": False,  # `sampling.Sampling` applies the warpers
        "max_new_tokens": max(1, max_new_tokens),
        "eos_token_id": sorted(stop) or None,
        "use_cache": False,  # do not allocate a cache
    }
    try:
        # Call the class's method: the instance may override it.
        cast(Any, type(target)).generate(  # PreTrainedModel's type lacks GenerationMixin
            target,
            inputs=ids,
            attention_mask=torch.ones_like(ids),
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=StoppingCriteriaList(criteria),
            custom_generate=keep,
            **settings,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"transformers rejected the generation settings: {error}") from error
    return prepared[0], prepared[1]
