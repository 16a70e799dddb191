"""Overrides of `python -m train` that would have no effect.

Settings of a part that the same command disables (with speed.num_prompts=0, decode.prompts=0 or stages=[...]) are not
reported.
"""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from data.config.unused import Unused
from train.settings.derived import accelerator


def _local(path: object) -> bool:
    return isinstance(path, str) and Path(path).exists()


def _read_by_benchmarks(config: DictConfig, key: str) -> bool:
    written = OmegaConf.to_container(config.benchmarks, resolve=False)
    return f"${{{key}}}" in str(written)


def _zero3(config: DictConfig) -> bool:
    strategy = config.trainer.get("strategy")
    return isinstance(strategy, DictConfig) and strategy.get("stage") == 3


def _of_stage(stage: str) -> Unused:
    return Unused(
        (f"stage.{stage}.best_by", f"stage.{stage}.patience"),
        lambda c: c.data.validation_records == 0 and c.stage[stage].best_by is not None,
        "data.validation_records=0 disables validation",
    )


EVALUATE = "stage.evaluate"
TABLE = (
    Unused(("regenerate",), lambda c: True, "only python -m data.regenerate reads it"),
    Unused(("hardware",), lambda c: not c.plan, "only plan=true reads it"),
    Unused(("objective.alpha",), lambda c: c.objective.weights != "dpace", "objective.weights is not dpace"),
    Unused(("objective.gamma",), lambda c: c.objective.weights != "decay", "objective.weights is not decay"),
    Unused(
        ("objective.temperature",),
        lambda c: not c.objective.kl and not c.objective.tv,
        "objective.kl and objective.tv are 0",
    ),
    Unused(
        ("stage.attention_tuning.module.bonus_slot_fraction",),
        lambda c: not c.model.draft.bonus_slot,
        "model.draft.bonus_slot=false",
    ),
    Unused(
        ("stage.bonus_calibration.module.bonus_slot_fraction",),
        lambda c: not c.model.draft.bonus_slot and not c.model.draft.chain_rank,
        "model.draft.bonus_slot=false and model.draft.chain_rank=0",
    ),
    _of_stage("attention_tuning"),
    _of_stage("bonus_calibration"),
    Unused((f"{EVALUATE}.threshold",), lambda c: c.stage.evaluate.selection == "off", f"{EVALUATE}.selection=off"),
    Unused(
        (f"{EVALUATE}.top_k", f"{EVALUATE}.top_p"),
        lambda c: c.stage.evaluate.temperature == 0,
        f"{EVALUATE}.temperature=0 decodes greedily",
    ),
    Unused(
        (f"{EVALUATE}.speed.thresholds",), lambda c: c.stage.evaluate.selection == "off", f"{EVALUATE}.selection=off"
    ),
    Unused(("export.private", "export.tag"), lambda c: c.export.push_to_hub is None, "export.push_to_hub=null"),
    Unused(("runtime.compile",), lambda c: c.runtime.compile and _zero3(c), "layers are not compiled under ZeRO 3"),
    Unused(("data.prompts",), lambda c: not _read_by_benchmarks(c, "data.prompts"), "no benchmark uses it as its path"),
    Unused(
        ("model.target.revision",),
        lambda c: c.model.target.name is None or _local(c.model.target.name),
        "model.target.name is not a Hub ID",
    ),
    Unused(
        ("trainer.benchmark",),
        lambda c: accelerator(c) == "cpu",
        "it selects GPU kernels, but the trainer runs on the CPU",
    ),
)
