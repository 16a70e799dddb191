"""Composition of conf/ into one configuration, and validation of keys and types against conf/.

Only the commands use this module; library code takes plain arguments.
"""

import math
import sys
from contextlib import nullcontext
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import data
from data.config.ranges import RANGES, Range, check_number, check_ranges
from data.config.renamed import current_name
from data.errors import UserError

PACKAGE = Path(data.__file__).resolve().parent
# A wheel contains conf/ inside this package (setup.py); a checkout has it next to src/.
CONF = next((place for place in (PACKAGE / "conf", PACKAGE.parents[1] / "conf") if place.is_dir()), PACKAGE / "conf")
EMBEDDED = PACKAGE / "tiny"  # target, conversations and prompts shipped with the project
GROUPS = tuple(sorted(folder.name for folder in CONF.glob("*/")))
# Values for the settings without a default, to compose the defaults alone.
REQUIRED = ("name=any", "model.target.name=any")
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
    "regenerate.server.key_file": str,
    "regenerate.server.model": str,  # defaults to the target's name; a target with random weights has none
}
for _stage in ("attention_tuning", "bonus_calibration"):
    NULLABLE |= {f"stage.{_stage}.{key}": kind for key, kind in (("best_by", str), ("patience", int))}
    NULLABLE[f"stage.{_stage}.micro_batch_size"] = int
# Keys that select classes; experiments and the command line must not change them.
WIRING = ("_target_", "_partial_")
# Passed unchanged to templates, architectures, Trainer, loggers and callbacks, which validate their own keys. A path
# may be a list of sources, validated when they are opened.
FREE_FORM = ("data.template_kwargs", "data.path", "model.target.architecture", "regenerate.server.extra")
FREE_FORM += ("overwrite",)  # true, false or stages; validated by train.settings.checks
FREE_FORM += ("trainer", "logger", "callbacks", "hydra", "benchmarks")


def cpu_precision() -> str:
    """Return the Lightning precision for training on this CPU: bfloat16 if natively supported, otherwise float32."""
    import torch  # lazy import: usage errors should not wait for torch

    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if native else "32-true"


OmegaConf.register_new_resolver("embedded", lambda: str(EMBEDDED), replace=True)
OmegaConf.register_new_resolver("cpu_precision", cpu_precision, replace=True)


def composed(overrides: list[str]) -> DictConfig:
    """Compose the configuration with these overrides.

    Raises:
        UserError: composition fails; the message names the setting and similar settings.
    """
    try:
        return _compose(overrides)
    except MissingConfigException as error:
        raise UserError(_unknown_choice(error)) from error
    except HydraException as error:
        key = getattr(error.__cause__, "full_key", None)
        raise UserError(unknown_key(str(key), _known(overrides)) if key else str(error).strip()) from error
    except OmegaConfBaseException as error:
        raise UserError(unresolved(error)) from error
    except ValueError as error:  # from Hydra, for an invalid group choice
        raise UserError(f"{' '.join(overrides)}: {error}") from error


def unresolved(error: OmegaConfBaseException) -> str:
    """One-line error message for an interpolation that does not resolve, such as `${no.such.key}`."""
    reason = str(error).strip().splitlines()[0]
    return f"{error.full_key}: {reason}" if error.full_key else reason


def command_line(usage: str | None) -> DictConfig:
    """Return the validated configuration of a command that takes only overrides. `--help` prints `usage` and exits.

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
    """Check all keys and types against conf/, choices of data settings, and ranges of numbers.

    Raises:
        UserError: a setting is invalid; the message gives its name and, where known, the expected value and the fix.
    """
    if OmegaConf.is_missing(config, "name"):
        raise UserError(
            "No experiment chosen. Choose one of conf/experiment/, such as +experiment=tiny, or set name=... and "
            "model.target.name=..."
        )
    known_config = _known_config(overrides)
    known: Any = OmegaConf.to_container(known_config, resolve=False)
    given: Any = OmegaConf.to_container(config, resolve=False)
    _compare(given, known, known, "")
    missing = sorted(path for path, value in _leaves(given, "") if value == "???")
    if missing:
        raise UserError(
            f"Settings without a value: {', '.join(missing)}. Give them on the command line or in an experiment."
        )
    types = (_composed_once(REQUIRED), known_config)  # defaults first: an experiment may itself have a wrong type
    defaults = dict(_leaves(OmegaConf.to_container(types[0], resolve=False), ""))
    for path, value in sorted(_leaves(given, ""), key=lambda leaf: leaf[0] not in ("name", "run_dir")):
        default = defaults.get(path)
        same = value is not None and type(value) is type(default) and value == default and "${" not in str(value)
        if not same and not _is_free(path) and not _is_wired(value):
            _check_leaf(config, types, path, value)
    if "/" in config.name or config.name in ("", ".", ".."):
        raise UserError(f"name={config.name!r}: expected a plain directory name; it names checkpoints/<name>.")
    check_finite(given)
    check_choices(config, {"model.target.dtype": ("float32", "bfloat16", "float64")})
    check_choices(config, {"data.bad_records": ("stop", "skip"), "data.truncation": ("turn", "token", "drop")})
    try:
        if empty := [key for key in RANGES if _is_free(key) and OmegaConf.select(config, key, default=0) is None]:
            raise UserError(f"{empty[0]}=null: expected a number.")
        check_ranges(config)
    except OmegaConfBaseException as error:
        raise UserError(unresolved(error)) from error


def check_finite(settings: Any, path: str = "") -> None:
    """Check that no setting is infinite or NaN. Range comparisons may not catch these, and they corrupt all results.

    Args:
        settings: nested plain values.

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


def plain(config: DictConfig, *groups: str) -> dict[str, Any]:
    """Resolve only these groups into plain values. Others may load dependencies that a command does not need."""
    return {group: OmegaConf.to_container(config[group], resolve=True) for group in groups}


def check_choices(config: DictConfig, choices: dict[str, tuple[str, ...]]) -> None:
    """Check that each setting has one of its allowed values.

    Raises:
        UserError: a value is not among the choices.
    """
    for key, known in choices.items():
        if (value := OmegaConf.select(config, key)) not in known:
            raise UserError(f"{key}={value!r}: expected {' or '.join('null' if k is None else k for k in known)}.")


def check_at_least(config: DictConfig, bounds: dict[str, float]) -> None:
    """Check that settings are numbers at or above their bounds; integers if the bound is an int. Null is accepted.

    Raises:
        UserError: a value is below its bound or has the wrong type.
    """
    for key, least in bounds.items():
        check_number(key, OmegaConf.select(config, key), Range(least))


def preset(group: str, name: str) -> DictConfig:
    """Return the settings of one file of conf/, such as ("trainer", "zero2"), with those of its base files."""
    return _composed_once((f"{group}={name}",))[group]


def _unknown_choice(error: MissingConfigException) -> str:
    """Error message for a file of conf/ that does not exist: its group has these. Base files start with `_`."""
    group, _, name = str(error.missing_cfg_file).rpartition("/")
    choices = [choice for choice in error.options or () if not choice.startswith("_")]
    if not choices:
        return f"{error.missing_cfg_file}: no such file in conf/."
    return f"{group}={name}: expected one of {', '.join(choices)} (conf/{group}/)."


def _known_config(overrides: list[str]) -> DictConfig:
    """Compose the reference configuration: only the overrides that choose config files are applied."""
    # Only overrides with a value: `~group` would delete required settings. So would `stage=...`, which keeps one stage.
    groups = set(GROUPS) - {"stage"}
    return _composed_once(tuple(o for o in overrides if "=" in o and o.split("=")[0].lstrip("+") in groups))


@cache
def _composed_once(overrides: tuple[str, ...]) -> DictConfig:
    return _compose(list(overrides))


def _known(overrides: list[str]) -> dict[str, Any]:
    known: Any = OmegaConf.to_container(_known_config(overrides), resolve=False)
    return known


def _compose(overrides: list[str]) -> DictConfig:
    inside = GlobalHydra.instance().is_initialized()  # under hydra.main
    with nullcontext() if inside else initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=overrides)


def _compare(given: Any, known: Any, root: dict[str, Any], path: str) -> None:
    if isinstance(known, dict) and not isinstance(given, dict) and (path not in FREE_FORM or "." not in path):
        raise UserError(f"{path}={given!r}: expected settings, not a value. {path} has: {', '.join(known)}.")
    if path in FREE_FORM:
        return
    if isinstance(known, dict):
        if missing := [key for key in known if key not in given]:
            here = f"{path}.{missing[0]}" if path else str(missing[0])
            raise UserError(f"{here}: every setting is required; change its value instead of deleting it.")
        for key, value in given.items():
            here = f"{path}.{key}" if path else str(key)
            if key not in known:
                raise UserError(unknown_key(here, root))
            _compare(value, known[key], root, here)
    elif given != known and _is_wired(known):
        raise UserError(f"{path}: always the value of {known[2:-1]}; set that.")
    elif isinstance(given, dict):
        raise UserError(f"{path}={given!r}: a value, not a group of settings.")


def _is_free(path: str) -> bool:
    return any(path == free or path.startswith(f"{free}.") for free in FREE_FORM)


def _is_wired(written: Any) -> bool:
    """Return whether a setting is an interpolation of a stage or objective setting, which is checked separately."""
    return isinstance(written, str) and written.startswith(("${stage.", "${objective}"))


def _check_leaf(config: DictConfig, types: tuple[DictConfig, ...], path: str, written: Any) -> None:
    """Check the type of one setting against conf/. For text settings, convert numbers (`name=1`) to text in `config`.

    Args:
        types: reference configurations. The first one with a non-null value determines the type.
        written: the value in `config` before interpolation.

    Raises:
        UserError: the type is wrong, the value does not resolve, or it changes a class.
    """
    try:
        value = _plain(config, path)
        known = next((v for source in types if (v := _plain(source, path)) is not None), None)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}={written}: {str(error).strip().splitlines()[0]}.") from error
    if path.rsplit(".", 1)[-1] in WIRING and value != known:
        raise UserError(f"{path}={value!r}: this class is not a setting; leave it out.")
    kind = NULLABLE.get(path) or (str if known is None else type(known))  # only `name` has no default
    if value is None and path in NULLABLE:
        return
    if kind is str and isinstance(value, int | float | bool):
        OmegaConf.update(config, path, str(value))
    elif not _is_a(value, kind):
        words = {int: "a whole number", str: "text", list: "a list"}
        wanted = f"{words[kind]} or null" if path in NULLABLE else f"{kind.__name__}, such as {known!r}"
        raise UserError(f"{path}={value!r}: expected {wanted}.")


def _plain(config: DictConfig, path: str) -> Any:
    value = OmegaConf.select(config, path)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def unknown_key(key: str, root: dict[str, Any]) -> str:
    """Error message for an unknown setting: its new name if renamed, similar settings, or the keys of its group."""
    if (now := current_name(key)) != key:
        return f"{key}: this setting is called {now} now."
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


def _is_a(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)
