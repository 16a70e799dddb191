"""Wrong calls end here: before anything is downloaded, loaded or written."""

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig

from data.configuration import check_at_least, check_choices, check_settings
from data.errors import UserError
from train.hardware import GPUS

STAGES = ("attention_tuning", "bonus_calibration", "export", "evaluate")
TRAINED = STAGES[:2]
VARIANTS = ("untuned", "attention_tuned", "calibrated_parallel", "calibrated")


def check_config(config: DictConfig) -> None:
    """Check names, types and ranges of all settings.

    Raises:
        UserError: naming the setting, its value, what was expected and the way out.
    """
    check_settings(config, list(HydraConfig.get().overrides.task))
    _check_stages(config)
    _check_ranges(config)
    _check_push(config)
    check_adapter(config)


def _check_stages(config: DictConfig) -> None:
    unknown = [stage for stage in config.stages if stage not in STAGES]
    if unknown or not config.stages:
        raise UserError(f"stages={list(config.stages)}: expected one or more of {', '.join(STAGES)}.")


def _check_push(config: DictConfig) -> None:
    if config.export.push_to_hub is None:
        return
    from train.hub import check_destination, destination  # late: it loads torch

    if not {"export", "evaluate"} & set(config.stages):
        raise UserError(
            f"export.push_to_hub={config.export.push_to_hub}: stages={list(config.stages)} exports no drafter. "
            "Add export to stages, or use scripts/push_to_hub.py."
        )
    check_destination(destination(config))


def check_adapter(config: DictConfig) -> None:
    """
    Raises:
        UserError: settings of `adapter=lora` that cannot be, or not with this strategy.
    """
    if not config.adapter:
        return
    check_at_least(config, {"adapter.rank": 1})
    if not config.adapter.alpha > 0:
        raise UserError(f"adapter.alpha={config.adapter.alpha}: expected more than 0.")
    if config.stage.bonus_calibration.module.joint and "bonus_calibration" in config.stages:
        raise UserError(
            "stage.bonus_calibration.module.joint=true trains whole projectors, so adapter=lora would save nothing. "
            "Choose stage.bonus_calibration.module.joint=false, or adapter=none."
        )
    chosen = config.adapter.target_modules
    if chosen is not None and not isinstance(chosen, ListConfig):
        raise UserError(f"adapter.target_modules={chosen}: expected a list, such as [q_proj, v_proj], or null.")
    strategy = config.trainer.get("strategy")
    if "attention_tuning" in config.stages and isinstance(strategy, DictConfig) and strategy.get("stage") == 3:
        raise UserError(
            "adapter=lora shares the target's projectors, which ZeRO 3 cuts into pieces. "
            "Choose trainer=zero2, or adapter=none."
        )


def _check_ranges(config: DictConfig) -> None:
    """Ranges and choices of single settings."""
    draft = config.model.draft
    choices = {"export.dtype": ("float32", "bfloat16"), "hardware.gpu": tuple(GPUS)}
    choices["speed.attention"] = ("auto", "flex", "sdpa", "dense")
    choices |= {f"stage.{stage}.best_by": ("val/tau", "val/tau_estimate", None) for stage in TRAINED}
    # Any other would train weights in less than float32, or needs a scaler of the loss.
    choices["trainer.precision"] = ("32-true", "bf16-mixed")
    check_choices(config, choices)
    if config.trainer.precision == "32-true" and config.model.target.dtype not in ("float32", "float64"):
        raise UserError(
            f"model.target.dtype={config.model.target.dtype} with trainer.precision=32-true: the target's layers would "
            "meet float32 projectors. Set trainer.precision=bf16-mixed, or model.target.dtype=float32."
        )
    at_least = {"model.draft.num_layers": 1, "model.draft.block_size": 2, "model.draft.calibrator_rank": 1}
    at_least |= {
        "model.draft.chain_rank": 0,
        "stage.evaluate.num_prompts": 1,
        "stage.evaluate.max_new_tokens": 2,
        "stage.evaluate.batch_size": 1,
        "stage.evaluate.speed.num_prompts": 0,
        "stage.evaluate.speed.repeats": 1,
        "hardware.gpus_per_node": 1,
        "speed.workers": 0,
    }
    for stage in TRAINED:
        keys = ("steps", "rows_per_step", "rows_per_pass", "num_anchors", "validate_every", "checkpoint_every")
        keys += ("keep_checkpoints", "max_skipped_steps", "module.chunk")
        at_least |= {f"stage.{stage}.{key}": 1 for key in keys}
    check_at_least(config, at_least)
    for stage in TRAINED:
        settings = config.stage[stage]
        for key in ("learning_rate", "eps"):
            if not settings.module[key] > 0:
                raise UserError(f"stage.{stage}.module.{key}={settings.module[key]}: expected more than 0.")
        if draft.bonus_slot and settings.module.slot0_loss:
            raise UserError(
                f"stage.{stage}.module.slot0_loss=true with model.draft.bonus_slot=true: slot 0 would be told its "
                "label. Choose one of them."
            )
        for key in ("warmup_share", "final_lr_share", "told_share"):
            if not 0 <= settings.module[key] <= 1:
                raise UserError(f"stage.{stage}.module.{key}={settings.module[key]}: expected 0 to 1.")
    speed = config.stage.evaluate.speed
    if not speed.batch_sizes or any(not isinstance(rows, int) or rows < 1 for rows in speed.batch_sizes):
        raise UserError(f"stage.evaluate.speed.batch_sizes={list(speed.batch_sizes)}: expected numbers of 1 or more.")
    if any(not isinstance(t, int | float) or not 0 <= t <= 1 for t in speed.thresholds):
        raise UserError(f"stage.evaluate.speed.thresholds={list(speed.thresholds)}: expected probabilities, 0 to 1.")
    if not 0 < config.hardware.share_of_peak <= 1:
        raise UserError(f"hardware.share_of_peak={config.hardware.share_of_peak}: expected more than 0, 1 at most.")
    unknown = [name for name in config.stage.evaluate.variants if name not in VARIANTS]
    if unknown or not config.stage.evaluate.variants:
        variants = list(config.stage.evaluate.variants)
        raise UserError(f"stage.evaluate.variants={variants}: expected one or more of {', '.join(VARIANTS)}.")
    if draft.block_size > config.data.row_length:
        raise UserError(
            f"model.draft.block_size={draft.block_size} exceeds data.row_length={config.data.row_length}; "
            "make rows longer or blocks smaller."
        )


def check_target(config: DictConfig, target_config: Any, positions: int, tokens: int) -> None:
    """Check the settings against the target's config, how many tokens a text may have, and its tokenizer's size, before
    its weights are read.

    Raises:
        UserError: draft layers, positions or vocabulary do not fit.
    """
    layers = config.model.draft.num_layers
    if layers > target_config.num_hidden_layers:
        raise UserError(
            f"model.draft.num_layers={layers}, but the target has {target_config.num_hidden_layers} layers; "
            "the draft layers are the last of them, choose fewer."
        )
    longest = config.data.row_length + config.model.draft.block_size
    if longest > positions:
        raise UserError(
            f"data.row_length + model.draft.block_size = {longest} exceeds the target's {positions} positions."
        )
    if tokens > target_config.vocab_size:
        raise UserError(
            f"The tokenizer {config.model.target.tokenizer or config.model.target.name!r} has {tokens} tokens, "
            f"the target's vocabulary {target_config.vocab_size}: they do not match. Set model.target.tokenizer."
        )


def check_sizes(expected: dict[str, Any], loaded: dict[str, Any]) -> None:
    """The target must have the sizes that the settings expect of it, and that `plan=true` counts with.

    Raises:
        UserError: naming the first that differs.
    """
    for key, value in expected.items():
        if loaded.get(key) != value:
            raise UserError(
                f"model.target.architecture.{key}={value!r}, but the target's config has {loaded.get(key)!r}. "
                "Correct it, or set model.target.architecture=null."
            )


def check_path(name: str) -> None:
    """A target given as a path must exist; otherwise transformers would look for it on the Hub.

    Raises:
        UserError: it does not.
    """
    looks_local = Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1
    if looks_local and not Path(name, "config.json").exists():
        raise UserError(
            f"model.target.name={name}: no config.json there. Give a model's directory or a Hub id (owner/name)."
        )
