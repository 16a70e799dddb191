"""The allowed range of every numeric setting in conf/. A test checks that none is missing."""

import math
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from data.errors import UserError

STAGES = ("attention_tuning", "bonus_calibration")
INT32_MAX = 2**31 - 1  # limit for integers: every library accepts int32 values
FLOAT32_MAX = 3e38  # limit for floats: the optimizer computes in float32


@dataclass(frozen=True)
class Range:
    """An interval of numbers, or of integers if `low` is an int. `above` excludes `low`; `below` excludes `high`."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    @property
    def integer(self) -> bool:
        return isinstance(self.low, int)

    @property
    def maximum(self) -> float:
        return min(self.high, INT32_MAX if self.integer else FLOAT32_MAX)

    def contains(self, value: float) -> bool:
        above_low = value > self.low if self.above else value >= self.low
        return above_low and (value < self.high if self.below else value <= self.maximum)

    def describe(self) -> str:
        """Return the range as written in error messages, e.g. `>= 1` or `in (0, 1]`."""
        low, high = _format(self.low), _format(self.maximum)
        if self.above:
            return f"> {low}" if self.high == math.inf else f"in ({low}, {high}]"
        if self.below:
            return f"in [{low}, {high})"
        if self.low == self.high:
            return low
        return f">= {low}" if self.high == math.inf else f"in [{low}, {high}]"


POSITIVE_INT, NON_NEGATIVE_INT, FRACTION = Range(1), Range(0), Range(0.0, 1.0)
POSITIVE, NON_NEGATIVE = Range(0.0, above=True), Range(0.0)
PROBABILITY = Range(0.0, 1.0, above=True)  # (0, 1]
PROCESSES = 1024  # larger values are almost certainly typos and would overload the machine

RANGES = {
    "seed": Range(0, 2**32 - 1),  # the seeds that numpy accepts
    "runtime.workers": Range(0, PROCESSES),
    "hardware.gpus_per_node": Range(1, PROCESSES),
    "hardware.mfu": PROBABILITY,
    "model.draft.num_layers": POSITIVE_INT,
    "model.draft.block_size": Range(2),
    "model.draft.calibrator_rank": POSITIVE_INT,
    "model.draft.chain_rank": NON_NEGATIVE_INT,
    "data.max_seq_len": Range(2),
    "data.validation_records": NON_NEGATIVE_INT,
    "data.max_records": POSITIVE_INT,
    "data.num_proc": Range(1, PROCESSES),
    "adapter.rank": POSITIVE_INT,
    "adapter.alpha": POSITIVE,
    "objective.ce": NON_NEGATIVE,
    "objective.kl": NON_NEGATIVE,
    "objective.tv": NON_NEGATIVE,
    "objective.alpha": FRACTION,
    "objective.gamma": POSITIVE,
    "objective.temperature": POSITIVE,
    "callbacks.progress.refresh_rate": NON_NEGATIVE_INT,
    "logger.csv.flush_logs_every_n_steps": POSITIVE_INT,
    "trainer.num_nodes": POSITIVE_INT,
    "regenerate.temperature": NON_NEGATIVE,
    "regenerate.top_p": PROBABILITY,
    "regenerate.max_new_tokens": POSITIVE_INT,
    "regenerate.repeat_words": POSITIVE_INT,
    "regenerate.repeat_times": NON_NEGATIVE_INT,
    "regenerate.local.batch_size": POSITIVE_INT,
    "regenerate.server.in_flight": POSITIVE_INT,
    "regenerate.server.patience": NON_NEGATIVE,
    "regenerate.server.timeout": POSITIVE,
    "stage.evaluate.num_prompts": POSITIVE_INT,
    "stage.evaluate.max_new_tokens": Range(2),
    "stage.evaluate.batch_size": POSITIVE_INT,
    "stage.evaluate.threshold": FRACTION,
    "stage.evaluate.temperature": NON_NEGATIVE,
    "stage.evaluate.top_k": NON_NEGATIVE_INT,
    "stage.evaluate.top_p": PROBABILITY,
    "stage.evaluate.speed.num_prompts": NON_NEGATIVE_INT,
    "stage.evaluate.speed.repeats": POSITIVE_INT,
}
TRAINING_RANGES = {
    "steps": POSITIVE_INT,
    "global_batch_size": POSITIVE_INT,
    "micro_batch_size": POSITIVE_INT,
    "num_anchors": POSITIVE_INT,
    "gradient_clip": NON_NEGATIVE,
    "validate_every": POSITIVE_INT,
    "decode.prompts": NON_NEGATIVE_INT,
    "decode.max_new_tokens": Range(2),
    "decode.batch_size": POSITIVE_INT,
    "patience": POSITIVE_INT,
    "checkpoint_every": POSITIVE_INT,
    "keep_checkpoints": POSITIVE_INT,
    "max_skipped_steps": POSITIVE_INT,
    "module.chunk": POSITIVE_INT,
    "module.learning_rate": POSITIVE,
    "module.weight_decay": NON_NEGATIVE,
    "module.eps": POSITIVE,
    "module.warmup_ratio": FRACTION,
    "module.min_lr_ratio": FRACTION,
    "module.bonus_slot_fraction": FRACTION,
}
RANGES |= {f"stage.{stage}.{key}": limits for stage in STAGES for key, limits in TRAINING_RANGES.items()}

# Settings that are lists of numbers: range of the length, range of each element.
LISTS = {f"stage.{stage}.module.betas": (Range(2, 2), Range(0.0, 1.0, below=True)) for stage in STAGES}
LISTS |= {
    "stage.evaluate.speed.batch_sizes": (POSITIVE_INT, POSITIVE_INT),
    "stage.evaluate.speed.thresholds": (NON_NEGATIVE_INT, FRACTION),
}


def check_ranges(config: DictConfig) -> None:
    """Check that every number in `config` is within its range. Null is accepted.

    Raises:
        UserError: a value is out of range or not a number; the message names the first such setting.
    """
    for key, limits in RANGES.items():
        check_number(key, OmegaConf.select(config, key), limits)
    for key, (count, limits) in LISTS.items():
        values = OmegaConf.select(config, key)
        if values is None:
            continue
        if not count.contains(len(values)):
            raise UserError(f"{key}={list(values)}: the length of the list must be {count.describe()}.")
        if any(not _is_number(value, limits) or not limits.contains(value) for value in values):
            raise UserError(f"{key}={list(values)}: each element must be {_type_name(limits)} {limits.describe()}.")


def check_number(key: str, value: Any, limits: Range) -> None:
    """Check that a setting's value is a number within `limits`. None is accepted.

    Raises:
        UserError: the value is out of range or not a number.
    """
    if value is None:
        return
    if not _is_number(value, limits):
        raise UserError(f"{key}={value!r}: expected {_type_name(limits)}.")
    if not limits.contains(value):
        too_large_for_its_type = value > limits.maximum and limits.high == math.inf
        allowed = f"<= {_format(limits.maximum)}" if too_large_for_its_type else limits.describe()
        raise UserError(f"{key}={value}: must be {allowed}.")


def _is_number(value: Any, limits: Range) -> bool:
    return isinstance(value, int if limits.integer else int | float) and not isinstance(value, bool)


def _format(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def _type_name(limits: Range) -> str:
    return "an integer" if limits.integer else "a number"
