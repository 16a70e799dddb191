"""Checks across settings, run before anything is downloaded, loaded or written."""

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig
from omegaconf.errors import OmegaConfBaseException

from data.config.compose import unresolved
from data.config.unused import check_unused
from data.config.validate import check_at_least, check_choices, check_settings
from data.errors import UserError
from models.cost.hardware import GPUS
from train.names import SELECTIONS, STAGES, TAU, TRAINED, VARIANTS
from train.settings.derived import precision
from train.settings.no_effect import TABLE
from train.settings.trainer import check_trainer


def check_config(config: DictConfig) -> None:
    """Check names, types and ranges of all settings.

    Raises:
        UserError: a setting is invalid; the message names it, its value, the expected values and a fix.
    """
    try:
        _check(config, list(HydraConfig.get().overrides.task))
    except OmegaConfBaseException as error:
        raise UserError(unresolved(error)) from error


def _check(config: DictConfig, overrides: list[str]) -> None:
    """Run all checks of `check_config`.

    Raises:
        UserError: as for `check_config`.
        OmegaConfBaseException: an interpolation cannot be resolved.
    """
    check_settings(config, overrides)
    check_trainer(config)
    _check_stages(config)
    _check_ranges(config)
    _check_push(config)
    check_adapter(config)
    check_decoding(config)
    if not config.plan:
        check_unused(config, overrides, TABLE)


def _check_stages(config: DictConfig) -> None:
    unknown = [stage for stage in config.stages if stage not in STAGES]
    if unknown or not config.stages:
        raise UserError(f"stages={list(config.stages)}: expected one or more of {', '.join(STAGES)}.")
    again = config.overwrite
    if not isinstance(again, bool):
        names = list(again) if isinstance(again, ListConfig) else [again]
        if not names or any(name not in STAGES for name in names):
            raise UserError(
                f"overwrite={_plain(again)}: expected true, false, or one or more of {', '.join(STAGES)}, e.g. "
                "overwrite=evaluate or overwrite=[export,evaluate]."
            )
        idle = [name for name in names if name not in config.stages]
        if idle:
            raise UserError(
                f"overwrite={_plain(again)}: stages={list(config.stages)} does not contain {', '.join(idle)}. "
                "Add it to stages, or remove it from overwrite."
            )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, ListConfig) else value


def _check_push(config: DictConfig) -> None:
    if config.export.push_to_hub is None:
        return
    from train.publish.upload import check_destination, destination  # deferred: imports torch

    if not {"export", "evaluate"} & set(config.stages):
        raise UserError(
            f"export.push_to_hub={config.export.push_to_hub}: stages={list(config.stages)} does not export a drafter. "
            "Add export to stages, or use scripts/push_to_hub.py."
        )
    check_destination(destination(config))


def check_adapter(config: DictConfig) -> None:
    """Check the settings of `adapter=lora`.

    Raises:
        UserError: a setting is invalid or incompatible with the trainer's strategy.
    """
    if not config.adapter:
        return
    check_at_least(config, {"adapter.rank": 1})
    if not config.adapter.alpha > 0:
        raise UserError(f"adapter.alpha={config.adapter.alpha}: must be > 0.")
    if config.stage.bonus_calibration.module.joint and "bonus_calibration" in config.stages:
        raise UserError(
            "stage.bonus_calibration.module.joint=true trains the full projectors, so adapter=lora saves no memory. "
            "Set stage.bonus_calibration.module.joint=false or adapter=none."
        )
    chosen = config.adapter.target_modules
    if chosen is not None and not isinstance(chosen, ListConfig):
        raise UserError(f"adapter.target_modules={chosen}: expected a list, e.g. [q_proj, v_proj], or null.")
    strategy = config.trainer.get("strategy")
    if "attention_tuning" in config.stages and isinstance(strategy, DictConfig) and strategy.get("stage") == 3:
        raise UserError(
            "adapter=lora shares the target's projectors, which ZeRO 3 partitions. Set trainer=zero2 or adapter=none."
        )


def _check_ranges(config: DictConfig) -> None:
    """Check ranges and choices of individual settings."""
    draft = config.model.draft
    choices: dict[str, tuple[Any, ...]] = {"export.dtype": ("float32", "bfloat16"), "hardware.gpu": tuple(GPUS)}
    choices["runtime.attention"] = ("auto", "flex", "sdpa", "dense")
    choices |= {f"stage.{stage}.best_by": ("val/tau", "val/tau_estimate", None) for stage in TRAINED}
    choices["stage.evaluate.selection"] = SELECTIONS
    check_choices(config, choices)
    if precision(config) == "32-true" and config.model.target.dtype not in ("float32", "float64"):
        raise UserError(
            f"model.target.dtype={config.model.target.dtype} with trainer.precision=32-true: the target's layers "
            "and the float32 projectors would have different dtypes. Set trainer.precision=bf16-mixed or "
            "model.target.dtype=float32."
        )
    for stage in TRAINED:
        settings = config.stage[stage]
        if draft.bonus_slot and settings.module.slot0_loss:
            raise UserError(
                f"stage.{stage}.module.slot0_loss=true with model.draft.bonus_slot=true: slot 0 would receive its "
                "own label as input. Set one of them to false."
            )
        blocks = config.data.max_seq_len - 2  # neither the first nor the last token of a row can be an anchor
        if settings.num_anchors > blocks:
            raise UserError(
                f"stage.{stage}.num_anchors={settings.num_anchors}: expected at most {blocks}, the number of "
                f"possible anchors in a row of data.max_seq_len={config.data.max_seq_len} tokens."
            )
    unknown = [name for name in config.stage.evaluate.variants if name not in VARIANTS]
    if unknown or not config.stage.evaluate.variants:
        variants = list(config.stage.evaluate.variants)
        raise UserError(f"stage.evaluate.variants={variants}: expected one or more of {', '.join(VARIANTS)}.")
    if draft.block_size > config.data.max_seq_len:
        raise UserError(
            f"model.draft.block_size={draft.block_size} exceeds data.max_seq_len={config.data.max_seq_len}. "
            "Increase data.max_seq_len or decrease model.draft.block_size."
        )


def check_decoding(config: DictConfig) -> None:
    """Check live decoding, best_by and patience for all chosen training stages before the first one starts.

    Raises:
        UserError: a setting is out of range, or relies on a metric that is not measured.
    """
    for stage in TRAINED:
        if stage in config.stages:
            _check_stage(config, stage)


def _check_stage(config: DictConfig, stage: str) -> None:
    """Check live decoding, best_by and patience for one training stage.

    Raises:
        UserError: as for `check_decoding`.
    """
    settings, here = config.stage[stage], f"stage.{stage}"
    at_least = {"decode.prompts": 0, "decode.max_new_tokens": 2, "decode.batch_size": 1, "patience": 1}
    check_at_least(config, {f"{here}.{key}": least for key, least in at_least.items()})
    if settings.best_by == TAU and not settings.decode.prompts:
        raise UserError(
            f"{here}.best_by={TAU} with {here}.decode.prompts=0: {TAU} would not be measured. "
            f"Set {here}.best_by to val/tau_estimate or null, or increase {here}.decode.prompts."
        )
    if settings.patience and not config.data.validation_records:
        raise UserError(
            f"{here}.patience={settings.patience} with data.validation_records=0: validation is disabled. "
            f"Increase data.validation_records or set {here}.patience=null."
        )
    if settings.patience and not settings.best_by:
        raise UserError(
            f"{here}.patience={settings.patience} with {here}.best_by=null: there is no metric to monitor. "
            f"Set {here}.best_by, or {here}.patience=null."
        )
    validations = -(-settings.steps // settings.validate_every)  # including the one at the last step
    if settings.patience and settings.patience > validations:
        raise UserError(
            f"{here}.patience={settings.patience} has no effect: it exceeds the number of validations, {validations} "
            f"({here}.steps={settings.steps}, {here}.validate_every={settings.validate_every}). Decrease "
            f"{here}.patience or {here}.validate_every."
        )


def check_target(config: DictConfig, target_config: Any, positions: int) -> None:
    """Check the settings against the target's config and maximum sequence length, before its weights are loaded.

    Raises:
        UserError: there are too many draft layers, the rows are too long, or a rank is too large.
    """
    layers = config.model.draft.num_layers
    if layers > target_config.num_hidden_layers:
        raise UserError(
            f"model.draft.num_layers={layers}: expected at most {target_config.num_hidden_layers}, the target's "
            "number of layers."
        )
    check_ranks(config, target_config)
    longest = config.data.max_seq_len + config.model.draft.block_size
    if longest > positions:
        raise UserError(
            f"data.max_seq_len + model.draft.block_size = {longest} exceeds the target's context length of "
            f"{positions}. Decrease one of them."
        )


def check_ranks(config: DictConfig, target_config: Any) -> None:
    """Check the ranks of calibrator, chain and adapter against the target's sizes.

    Raises:
        UserError: a rank exceeds the largest possible rank of its matrix, which would waste memory.
    """
    for key in ("calibrator_rank", "chain_rank"):
        if config.model.draft[key] > target_config.vocab_size:
            raise UserError(
                f"model.draft.{key}={config.model.draft[key]}: expected at most {target_config.vocab_size}, the "
                "target's vocabulary size."
            )
    if config.adapter and config.adapter.rank > target_config.hidden_size:
        raise UserError(
            f"adapter.rank={config.adapter.rank}: expected at most {target_config.hidden_size}, the target's "
            "hidden_size."
        )


def check_sizes(expected: dict[str, Any], loaded: dict[str, Any]) -> None:
    """Check that the target has the sizes given in the settings, which `plan=true` uses for its estimates.

    Raises:
        UserError: a size differs; the message names the first mismatch.
    """
    for key, value in expected.items():
        if loaded.get(key) != value:
            raise UserError(
                f"model.target.architecture.{key}={value!r}, but the target's config has {loaded.get(key)!r}. "
                "Correct the setting or use model=custom."
            )


def check_path(name: str) -> None:
    """Check that a target given as a path exists; otherwise transformers would look for it on the Hub.

    Raises:
        UserError: the path contains no config.json.
    """
    looks_local = Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1
    if looks_local and not Path(name, "config.json").exists():
        raise UserError(
            f"model.target.name={name}: config.json not found. Expected a model directory or a Hub ID (owner/name)."
        )
