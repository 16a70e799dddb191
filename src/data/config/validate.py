"""Validates a configuration: keys and types against conf/, numeric ranges, and settings with a fixed set of values."""

import math
import sys
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.config.compose import as_dict, composed, defaults, leaves, reference, unknown_key, unresolved
from data.config.ranges import RANGES, STAGES, Range, check_number, check_ranges
from data.errors import UserError

# Settings that may be null (documented in conf/), with the type of non-null values.
NULLABLE: dict[str, type] = {
    "model.target.name": str,
    "model.target.revision": str,
    "model.target.tokenizer": str,
    "data.max_records": int,
    "data.num_proc": int,
    "adapter.target_modules": list,
    "export.push_to_hub": str,
    "export.tag": str,
    "regenerate.draft": str,
    "regenerate.server.key_file": str,
    "regenerate.server.model": str,  # defaults to the target's name; a target with random weights has none
    **{f"stage.{stage}.best_by": str for stage in STAGES},
    **{f"stage.{stage}.patience": int for stage in STAGES},
    **{f"stage.{stage}.micro_batch_size": int for stage in STAGES},
}
# Not compared with conf/: either passed on to templates, architectures, the Trainer, loggers and callbacks, which do
# their own validation, or validated by the code that reads them.
FREE_FORM = (
    "data.template_kwargs",
    "data.path",  # a path or a list of sources
    "model.target.architecture",
    "regenerate.server.extra",
    "overwrite",  # true, false or stages
    "trainer",
    "logger",
    "callbacks",
    "hydra",
    "benchmarks",
)
# Keys that select classes; experiments and the command line must not change them.
CLASS_KEYS = ("_target_", "_partial_")
CHOICES: dict[str, tuple[str, ...]] = {
    "model.target.dtype": ("float32", "bfloat16", "float64"),
    "data.bad_records": ("stop", "skip"),
    "data.truncation": ("turn", "token", "drop"),
}
TYPE_NAMES = {int: "an integer", str: "a string", list: "a list"}


def command_line(usage: str | None) -> DictConfig:
    """Return the validated configuration for a command that takes only overrides. `--help` prints `usage` and exits.

    Raises:
        UserError: see `composed` and `check_settings`.
    """
    overrides = sys.argv[1:]
    if {"-h", "--help"} & set(overrides):
        print(usage)
        sys.exit()
    config = composed(overrides)
    check_settings(config, overrides)
    return config


def check_settings(config: DictConfig, overrides: list[str]) -> None:
    """Check keys and types against conf/, then numeric ranges and the settings in `CHOICES`.

    Raises:
        UserError: a setting is invalid; the message names it and, where known, gives the expected value and the fix.
    """
    if OmegaConf.is_missing(config, "name"):
        raise UserError(
            "No experiment selected. Select one from conf/experiment/, e.g. +experiment=tiny, or set name=... and "
            "model.target.name=..."
        )
    known, given = as_dict(reference(overrides)), as_dict(config)
    _check_keys(given, known, known, "")
    if missing := sorted(path for path, value in leaves(given) if value == "???"):
        raise UserError(
            f"Required settings have no value: {', '.join(missing)}. Set them on the command line or in the experiment."
        )
    _check_types(config, given, overrides)
    if "/" in config.name or config.name in ("", ".", ".."):
        raise UserError(f"name={config.name!r}: expected a plain directory name (used for checkpoints/<name>).")
    check_finite(given)
    check_choices(config, CHOICES)
    try:
        if empty := [key for key in RANGES if _is_free(key) and OmegaConf.select(config, key, default=0) is None]:
            raise UserError(f"{empty[0]}=null: expected a number.")
        check_ranges(config)
    except OmegaConfBaseException as error:
        raise UserError(unresolved(error)) from error


def check_finite(settings: Any, path: str = "") -> None:
    """Check that no setting is infinite or NaN. Such values can pass range checks, and would corrupt all results.

    Args:
        settings: plain values, nested in dictionaries and lists.

    Raises:
        UserError: a setting is not finite; the message names the first one.
    """
    if isinstance(settings, dict | list):
        pairs = settings.items() if isinstance(settings, dict) else enumerate(settings)
        for key, value in pairs:
            here = f"{path}[{key}]" if isinstance(settings, list) else f"{path}.{key}" if path else str(key)
            check_finite(value, here)
    elif isinstance(settings, float) and not math.isfinite(settings):
        raise UserError(f"{path}={settings}: expected a finite number.")


def check_choices(config: DictConfig, choices: dict[str, tuple[str, ...]]) -> None:
    """Check that each setting has one of its allowed values.

    Raises:
        UserError: a value is not among the choices.
    """
    for key, allowed in choices.items():
        if (value := OmegaConf.select(config, key)) not in allowed:
            raise UserError(f"{key}={value!r}: expected {' or '.join('null' if k is None else k for k in allowed)}.")


def check_at_least(config: DictConfig, bounds: dict[str, float]) -> None:
    """Check that each setting is a number >= its bound, and an integer if the bound is an int. Null is accepted.

    Raises:
        UserError: a value is below its bound or has the wrong type.
    """
    for key, least in bounds.items():
        check_number(key, OmegaConf.select(config, key), Range(least))


def _check_keys(given: Any, known: Any, root: dict[str, Any], path: str) -> None:
    """Check that `given` has exactly the keys of `known`, at every level.

    Args:
        root: all known settings, from which names are suggested.

    Raises:
        UserError: a key is unknown or missing, a value is given for a group or vice versa, or a setting
            that is tied to another one is changed.
    """
    # Top-level groups must stay groups, even the free-form ones. Nested free-form settings may be null.
    section = path not in FREE_FORM or "." not in path
    if isinstance(known, dict) and not isinstance(given, dict) and section:
        raise UserError(f"{path}={given!r}: expected a group with the settings {', '.join(known)}.")
    if path in FREE_FORM:
        return
    if isinstance(known, dict):
        if missing := [key for key in known if key not in given]:
            here = f"{path}.{missing[0]}" if path else str(missing[0])
            raise UserError(f"{here}: settings cannot be deleted. Change the value instead.")
        for key, value in given.items():
            here = f"{path}.{key}" if path else str(key)
            if key not in known:
                raise UserError(unknown_key(here, root))
            _check_keys(value, known[key], root, here)
    elif given != known and _is_reference(known):
        raise UserError(f"{path} always equals {known[2:-1]}. Set {known[2:-1]} instead.")
    elif isinstance(given, dict):
        raise UserError(f"{path}={given!r}: expected a value, not a group of settings.")


def _check_types(config: DictConfig, given: dict[str, Any], overrides: list[str]) -> None:
    """Check the types of all settings except free-form ones. Settings equal to their default need no check."""
    default_config = defaults()
    sources = (default_config, reference(overrides))  # defaults first: the type in an experiment may be wrong
    default_values = dict(leaves(as_dict(default_config)))
    for path, value in sorted(leaves(given), key=lambda leaf: leaf[0] not in ("name", "run_dir")):
        default = default_values.get(path)
        same = value is not None and type(value) is type(default) and value == default and "${" not in str(value)
        if not same and not _is_free(path) and not _is_reference(value):
            _check_type(config, sources, path, value)


def _check_type(config: DictConfig, sources: tuple[DictConfig, ...], path: str, written: Any) -> None:
    """Check the type of one setting against conf/. If a string is expected, convert a number in `config` (`name=1`).

    Args:
        sources: reference configurations. The first one with a non-null value determines the type.
        written: the value in `config`, before interpolation.

    Raises:
        UserError: the type is wrong, the value cannot be resolved, or the setting selects a class and was changed.
    """
    try:
        value = _resolved(config, path)
        known = next((v for source in sources if (v := _resolved(source, path)) is not None), None)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}={written}: {str(error).strip().splitlines()[0]}.") from error
    if path.rpartition(".")[2] in CLASS_KEYS and value != known:
        raise UserError(f"{path}={value!r}: expected {known!r}, since classes cannot be changed. Remove it.")
    kind = NULLABLE.get(path) or (str if known is None else type(known))  # only `name` has no default
    if value is None and path in NULLABLE:
        return
    if kind is str and isinstance(value, int | float | bool):
        OmegaConf.update(config, path, str(value))
    elif not _is_a(value, kind):
        expected = f"{TYPE_NAMES[kind]} or null" if path in NULLABLE else f"{kind.__name__}, e.g. {known!r}"
        raise UserError(f"{path}={value!r}: expected {expected}.")


def _is_free(path: str) -> bool:
    return any(path == free or path.startswith(f"{free}.") for free in FREE_FORM)


def _is_reference(written: Any) -> bool:
    """Return whether a value refers to a stage or objective setting, which is checked where it is defined."""
    return isinstance(written, str) and written.startswith(("${stage.", "${objective}"))


def _resolved(config: DictConfig, path: str) -> Any:
    value = OmegaConf.select(config, path)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _is_a(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)
