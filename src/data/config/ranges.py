"""Table of the allowed range of every number in conf/. A test checks that the table is complete."""

import math
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from data.errors import UserError

STAGES = ("attention_tuning", "bonus_calibration")
LARGEST = 2**31 - 1  # for integers: int32 maximum, which every library accepts
FLOAT32 = 3e38  # for floats: the optimizer computes in float32


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; integers if `low` is an int. `above` and `below` exclude the respective bound."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int)

    @property
    def most(self) -> float:
        return min(self.high, LARGEST if self.whole else FLOAT32)

    def holds(self, value: float) -> bool:
        enough = value > self.low if self.above else value >= self.low
        return enough and (value < self.high if self.below else value <= self.most)

    def words(self) -> str:
        """Describe the range for an error message."""
        low, high = _shown(self.low), _shown(self.high)
        if self.above:
            return f"more than {low}" + ("" if self.high == math.inf else f", at most {high}")
        if self.below:
            return f"{low} or more, less than {high}"
        if self.low == self.high:
            return low
        if self.whole:
            return f"{low} or more" + ("" if self.high == math.inf else f", at most {high}")
        return f"{low} or more" if self.high == math.inf else f"{low} to {high}"


COUNT, SOME, SHARE = Range(1), Range(0), Range(0.0, 1.0)
POSITIVE, NOT_NEGATIVE = Range(0.0, above=True), Range(0.0)
PROBABILITY = Range(0.0, 1.0, above=True)  # excludes 0
PROCESSES = 1024  # larger values are typos and would overload the machine

RANGES = {
    "seed": Range(0, 2**32 - 1),  # range of numpy seeds
    "runtime.workers": Range(0, PROCESSES),
    "hardware.gpus_per_node": Range(1, PROCESSES),
    "hardware.mfu": PROBABILITY,
    "model.draft.num_layers": COUNT,
    "model.draft.block_size": Range(2),
    "model.draft.calibrator_rank": COUNT,
    "model.draft.chain_rank": SOME,
    "data.max_seq_len": Range(2),
    "data.validation_records": SOME,
    "data.max_records": COUNT,
    "data.num_proc": Range(1, PROCESSES),
    "adapter.rank": COUNT,
    "adapter.alpha": POSITIVE,
    "objective.ce": NOT_NEGATIVE,
    "objective.kl": NOT_NEGATIVE,
    "objective.tv": NOT_NEGATIVE,
    "objective.alpha": SHARE,
    "objective.gamma": POSITIVE,
    "objective.temperature": POSITIVE,
    "callbacks.progress.refresh_rate": SOME,
    "logger.csv.flush_logs_every_n_steps": COUNT,
    "trainer.num_nodes": COUNT,
    "regenerate.temperature": NOT_NEGATIVE,
    "regenerate.top_p": PROBABILITY,
    "regenerate.max_new_tokens": COUNT,
    "regenerate.repeat_words": COUNT,
    "regenerate.repeat_times": SOME,
    "regenerate.local.batch_size": COUNT,
    "regenerate.server.in_flight": COUNT,
    "regenerate.server.patience": NOT_NEGATIVE,
    "regenerate.server.timeout": POSITIVE,
    "stage.evaluate.num_prompts": COUNT,
    "stage.evaluate.max_new_tokens": Range(2),
    "stage.evaluate.batch_size": COUNT,
    "stage.evaluate.threshold": SHARE,
    "stage.evaluate.temperature": NOT_NEGATIVE,
    "stage.evaluate.top_k": SOME,
    "stage.evaluate.top_p": PROBABILITY,
    "stage.evaluate.speed.num_prompts": SOME,
    "stage.evaluate.speed.repeats": COUNT,
}
OF_A_TRAINING = {
    "steps": COUNT,
    "global_batch_size": COUNT,
    "micro_batch_size": COUNT,
    "num_anchors": COUNT,
    "gradient_clip": NOT_NEGATIVE,
    "validate_every": COUNT,
    "decode.prompts": SOME,
    "decode.max_new_tokens": Range(2),
    "decode.batch_size": COUNT,
    "patience": COUNT,
    "checkpoint_every": COUNT,
    "keep_checkpoints": COUNT,
    "max_skipped_steps": COUNT,
    "module.chunk": COUNT,
    "module.learning_rate": POSITIVE,
    "module.weight_decay": NOT_NEGATIVE,
    "module.eps": POSITIVE,
    "module.warmup_ratio": SHARE,
    "module.min_lr_ratio": SHARE,
    "module.bonus_slot_fraction": SHARE,
}
RANGES |= {f"stage.{stage}.{key}": limits for stage in STAGES for key, limits in OF_A_TRAINING.items()}

# Lists of numbers: range of the length, range of each element.
LISTS = {f"stage.{stage}.module.betas": (Range(2, 2), Range(0.0, 1.0, below=True)) for stage in STAGES}
LISTS |= {"stage.evaluate.speed.batch_sizes": (COUNT, COUNT), "stage.evaluate.speed.thresholds": (SOME, SHARE)}


def check_ranges(config: DictConfig) -> None:
    """Check the ranges of all numbers in `config`. Null is accepted.

    Raises:
        UserError: a value is out of range or not a number; the message names the first such setting.
    """
    for key, limits in RANGES.items():
        check_number(key, OmegaConf.select(config, key), limits)
    for key, (count, limits) in LISTS.items():
        values = OmegaConf.select(config, key)
        if values is None:
            continue
        if not count.holds(len(values)):
            raise UserError(f"{key}={list(values)}: expected a list of {count.words()} numbers.")
        if any(not _is_number(value, limits) or not limits.holds(value) for value in values):
            raise UserError(f"{key}={list(values)}: expected {_kind(limits)}s, each {limits.words()}.")


def check_number(key: str, value: Any, limits: Range) -> None:
    """Check that a setting's value is a number within `limits`. None is accepted.

    Raises:
        UserError: the value is out of range or not a number.
    """
    if value is None:
        return
    if not _is_number(value, limits):
        raise UserError(f"{key}={value!r}: expected a {_kind(limits)}.")
    if not limits.holds(value):
        too_large = limits.words() if limits.high < math.inf else f"at most {_shown(limits.most)}"
        raise UserError(f"{key}={value}: expected {limits.words() if value <= limits.most else too_large}.")


def _is_number(value: Any, limits: Range) -> bool:
    return isinstance(value, int if limits.whole else int | float) and not isinstance(value, bool)


def _shown(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def _kind(limits: Range) -> str:
    return "whole number" if limits.whole else "number"
