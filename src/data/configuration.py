"""conf/ as one configuration: composed, and every key and type compared with what conf/ knows.

Used by the commands alone; the library below them takes plain arguments.
"""

import math
import sys
from contextlib import nullcontext
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from data.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
GROUPS = (
    "experiment",
    "data",
    "model",
    "adapter",
    "stage",
    "regenerate",
    "objective",
    "benchmarks",
    "export",
    "trainer",
    "logger",
    "callbacks",
)
# Null asks for random weights; for all records; for one process per core; for the last weights; for a single pass.
NULLABLE = ("model.target.name", "data.max_records", "data.num_proc")
NULLABLE += ("stage.attention_tuning.best_by", "stage.bonus_calibration.best_by")
NULLABLE += ("stage.attention_tuning.patience", "stage.bonus_calibration.patience")
NULLABLE += ("stage.attention_tuning.rows_per_pass", "stage.bonus_calibration.rows_per_pass")
# Passed on as they are to templates, architectures, Trainer, loggers and callbacks, which know their own keys; a path
# may be a list of sources, which are checked where they are opened.
FREE_FORM = ("data.template_kwargs", "data.path", "model.target.architecture", "regenerate.server.extra")
FREE_FORM += ("trainer", "logger", "callbacks", "hydra", "benchmarks")


def cpu_precision() -> str:
    """Lightning's precision for training on this CPU: bfloat16 where it is native, float32 elsewhere."""
    import torch  # late: a wrong call should not wait for it

    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if native else "32-true"


OmegaConf.register_new_resolver("root", lambda: str(ROOT), replace=True)
OmegaConf.register_new_resolver("cpu_precision", cpu_precision, replace=True)


def composed(overrides: list[str]) -> DictConfig:
    """The configuration that these overrides give.

    Raises:
        UserError: they do not compose; the message names the setting and those that sound like it.
    """
    try:
        return _compose(overrides)
    except HydraException as error:
        key = getattr(error.__cause__, "full_key", None)
        raise UserError(unknown_key(str(key), _known(overrides)) if key else str(error).strip()) from error


def command_line(usage: str | None) -> DictConfig:
    """The checked configuration of a command that takes overrides and nothing else; `--help` prints its usage.

    Raises:
        UserError: as for `composed` and `check_settings`.
    """
    overrides = sys.argv[1:]
    if {"-h", "--help"} & set(overrides):
        print(usage)
        sys.exit()
    config = composed(overrides)
    check_settings(config, overrides)
    return config


def check_settings(config: DictConfig, overrides: list[str]) -> None:
    """Every key must be one that conf/ knows and of the same type as there; the data's settings within their ranges.

    Raises:
        UserError: naming the setting, its value, what was expected and the way out.
    """
    if OmegaConf.is_missing(config, "name"):
        raise UserError("No experiment chosen. Try: +experiment=tiny   (all: conf/experiment/)")
    known = _known(overrides)
    given = OmegaConf.to_container(config, resolve=False)
    _compare(given, known, known, "")
    missing = sorted(path for path, value in _leaves(given, "") if value == "???")
    if missing:
        raise UserError(
            f"Settings without a value: {', '.join(missing)}. Give them on the command line or in an experiment."
        )
    if not isinstance(config.name, str) or "/" in config.name or config.name in ("", ".", ".."):
        raise UserError(f"name={config.name!r}: expected a plain directory name; it names checkpoints/<name>.")
    check_finite(given)
    check_choices(config, {"model.target.dtype": ("float32", "bfloat16", "float64")})
    check_choices(config, {"data.bad_records": ("stop", "skip"), "data.overlong": ("turn", "token", "drop")})
    check_at_least(config, {"data.row_length": 2, "data.validation_records": 0})
    check_at_least(config, {"data.max_records": 1, "data.num_proc": 1})


def check_finite(settings: Any, path: str = "") -> None:
    """No setting of any group may be infinite or NaN: comparisons let them pass, and everything computed from them is
    lost.

    Args:
        settings: plain values, nested.

    Raises:
        UserError: naming the first setting that is not finite.
    """
    if isinstance(settings, dict | list):
        pairs = settings.items() if isinstance(settings, dict) else enumerate(settings)
        for key, value in pairs:
            here = f"{path}[{key}]" if isinstance(settings, list) else f"{path}.{key}" if path else str(key)
            check_finite(value, here)
    elif isinstance(settings, float) and not math.isfinite(settings):
        raise UserError(f"{path}={settings}: expected a finite number.")


def plain(config: DictConfig, *groups: str) -> dict[str, Any]:
    """Plain values of these groups alone; the others may ask for what a command need not load."""
    return {group: OmegaConf.to_container(config[group], resolve=True) for group in groups}


def check_choices(config: DictConfig, choices: dict[str, tuple[str, ...]]) -> None:
    """
    Raises:
        UserError: a setting is none of its choices.
    """
    for key, known in choices.items():
        if (value := OmegaConf.select(config, key)) not in known:
            raise UserError(f"{key}={value!r}: expected {' or '.join('null' if k is None else k for k in known)}.")


def check_at_least(config: DictConfig, bounds: dict[str, float]) -> None:
    """
    Raises:
        UserError: a setting is below its bound, or no number; a whole one, if the bound is whole. Whether it may be
            null is not decided here.
    """
    for key, least in bounds.items():
        value, kind = OmegaConf.select(config, key), int if isinstance(least, int) else int | float
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, kind):
            raise UserError(f"{key}={value!r}: expected a {'whole ' if kind is int else ''}number.")
        if value < least:
            raise UserError(f"{key}={value}: expected {least} or more.")


def _known(overrides: list[str]) -> dict[str, Any]:
    """The configuration with only the choices of files among `overrides`: what conf/ knows."""
    choices = [o for o in overrides if o.split("=")[0].lstrip("+~") in GROUPS]
    known: Any = OmegaConf.to_container(_compose(choices), resolve=False)
    return known


def _compose(overrides: list[str]) -> DictConfig:
    inside = GlobalHydra.instance().is_initialized()  # under hydra.main
    with nullcontext() if inside else initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=overrides)


def _compare(given: Any, known: Any, root: dict[str, Any], path: str) -> None:
    if path in FREE_FORM:
        return
    if isinstance(known, dict):
        if not isinstance(given, dict):
            raise UserError(f"{path}={given!r}: a group of settings, not a value. It holds: {', '.join(known)}.")
        for key, value in given.items():
            here = f"{path}.{key}" if path else str(key)
            if key not in known:
                raise UserError(unknown_key(here, root))
            _compare(value, known[key], root, here)
    elif not _same_type(given, known) and path not in NULLABLE:
        raise UserError(f"{path}={given!r}: expected {type(known).__name__}, such as {known!r}.")


def unknown_key(key: str, root: dict[str, Any]) -> str:
    """What to say of a setting that nothing reads: those that sound like it, else those of its group."""
    leaves = [path for path, _ in _leaves(root, "")]
    close = get_close_matches(key.rsplit(".", 1)[-1], {leaf.rsplit(".", 1)[-1] for leaf in leaves}, n=1)
    if close:
        same = [leaf for leaf in leaves if leaf.rsplit(".", 1)[-1] == close[0]]
        near = [leaf for leaf in same if leaf.rpartition(".")[0] == key.rpartition(".")[0]] or same
        return f"{key}: no such setting. Did you mean {' or '.join(near)}?"
    group = root
    for part in key.split(".")[:-1]:
        group = group.get(part, {})
    return f"{key}: no such setting. {key.rpartition('.')[0] or 'The top level'} has: {', '.join(map(str, group))}."


def _leaves(tree: Any, path: str) -> list[tuple[str, Any]]:
    if not isinstance(tree, dict) or not tree:
        return [(path, tree)]
    return [leaf for key, value in tree.items() for leaf in _leaves(value, f"{path}.{key}" if path else str(key))]


def _same_type(given: Any, known: Any) -> bool:
    if given is None:
        return known is None
    interpolated = any(isinstance(v, str) and "${" in v for v in (given, known))
    if known is None or interpolated or known == "???":
        return True
    if isinstance(known, bool) or isinstance(given, bool):
        return isinstance(known, bool) and isinstance(given, bool)
    if isinstance(known, float):
        return isinstance(given, int | float)
    return isinstance(given, type(known))
