"""Check the settings passed on to Lightning: Trainer arguments, callbacks and loggers."""

from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.config.compose import unresolved
from data.errors import UserError
from train.settings.derived import ALL, ARITHMETIC, devices, precision

INSTANCES = ("callbacks", "logger")  # config groups whose entries are instantiated
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
# Trainer argument -> allowed values; None: any value that Lightning accepts. All other arguments are set by the stages,
# would change training without being recorded, or would break the rule that batches are a function of the step.
ARGUMENTS: dict[str, tuple[Any, ...] | None] = {
    "_target_": ("lightning.Trainer",),
    "accelerator": ACCELERATORS,
    "devices": None,
    "num_nodes": None,
    "strategy": None,
    "precision": None,
    "deterministic": (True, False, "warn", None),
    "benchmark": (True, False, None),
    "detect_anomaly": (True, False),
    "enable_progress_bar": (True, False, None),
    "profiler": ("simple", "advanced", None),
    "max_time": None,
}


def check_trainer(config: DictConfig) -> None:
    """Check the arguments of the trainer, its callbacks and its loggers.

    Raises:
        UserError: an argument is not user-settable, or Lightning would reject or misinterpret its value.
    """
    try:
        groups: Any = [OmegaConf.to_container(config[group], resolve=True) for group in ("trainer", *INSTANCES)]
    except OmegaConfBaseException as error:
        raise UserError(unresolved(error)) from error
    given, *others = groups
    for key, value in given.items():
        if key not in ARGUMENTS:
            known = ", ".join(name for name in ARGUMENTS if name != "_target_")
            raise UserError(
                f"trainer.{key} cannot be set here: it is either controlled by the stage (conf/stage/) or unsupported. "
                f"Remove it. Supported: {known}."
            )
        check_choice(f"trainer.{key}", value, ARGUMENTS[key])
    if "_target_" not in given:
        raise UserError("trainer: _target_ is missing. Choose a preset from conf/trainer/, e.g. trainer=cpu.")
    # Other modes are not supported. For example, 16-true and bf16-true store the weights in 16 bits.
    check_choice("trainer.precision", precision(config), tuple(ARITHMETIC))
    chosen, auto = devices(config), given.get("devices") in ("auto", None)
    if given.get("accelerator") == "cpu" and not auto and (chosen == ALL or isinstance(chosen, list)):
        raise UserError(
            f"trainer.devices={given['devices']} with trainer.accelerator=cpu: expected a number of processes."
        )
    for group, instances in zip(INSTANCES, others, strict=True):
        for name, settings in instances.items():
            if not isinstance(settings, dict) or not isinstance(settings.get("_target_"), str):
                raise UserError(f"{group}.{name}={settings!r}: expected a mapping whose _target_ is a class.")
    _check_strategy(given.get("strategy", "auto"))


def check_choice(key: str, value: Any, known: tuple[Any, ...] | None) -> None:
    """Check that a value and its type match one of the `known` values. If `known` is None, any value is allowed.

    Raises:
        UserError: the value matches none of them.
    """
    if known is not None and not any(value is one or (type(value) is type(one) and value == one) for one in known):
        words = " or ".join("null" if one is None else str(one).lower() for one in known)
        raise UserError(f"{key}={value!r}: expected {words}.")


def _check_strategy(strategy: Any) -> None:
    if isinstance(strategy, str):
        return  # Lightning validates strategy names
    if not isinstance(strategy, dict) or "_target_" not in strategy:
        raise UserError(f"trainer.strategy={strategy!r}: expected a name, e.g. ddp, or a preset, e.g. trainer=zero2.")
    if strategy["_target_"].endswith("ZeroStrategy") and strategy.get("stage") not in (1, 2, 3):
        raise UserError(f"trainer.strategy.stage={strategy.get('stage')!r}: expected 1, 2 or 3.")
