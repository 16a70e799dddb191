"""Composes conf/ into a single configuration. Only the commands use it; library code takes plain arguments."""

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
from data.config.renamed import current_name
from data.errors import UserError

PACKAGE = Path(data.__file__).resolve().parent
# In a wheel, conf/ is inside this package (see setup.py); in a checkout, it is next to src/.
CONF = next((place for place in (PACKAGE / "conf", PACKAGE.parents[1] / "conf") if place.is_dir()), PACKAGE / "conf")
EMBEDDED = PACKAGE / "tiny"  # target, conversations and prompts shipped with the project
GROUPS = tuple(sorted(folder.name for folder in CONF.glob("*/")))


def cpu_precision() -> str:
    """Return the Lightning precision for training on this CPU: bfloat16 if supported natively, otherwise float32."""
    import torch  # imported late: usage errors should not have to wait for torch

    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if native else "32-true"


OmegaConf.register_new_resolver("embedded", lambda: str(EMBEDDED), replace=True)
OmegaConf.register_new_resolver("cpu_precision", cpu_precision, replace=True)


def composed(overrides: list[str]) -> DictConfig:
    """Compose the configuration from conf/ and `overrides`.

    Raises:
        UserError: composition failed; the message suggests similar settings or lists the choices for a group.
    """
    try:
        return _compose(overrides)
    except MissingConfigException as error:
        raise UserError(_unknown_choice(error)) from error
    except HydraException as error:
        key = getattr(error.__cause__, "full_key", None)
        raise UserError(unknown_key(str(key), as_dict(reference(overrides))) if key else str(error).strip()) from error
    except OmegaConfBaseException as error:
        raise UserError(unresolved(error)) from error
    except ValueError as error:  # from Hydra, for an invalid group choice
        raise UserError(f"{' '.join(overrides)}: {error}") from error


def defaults() -> DictConfig:
    """Return the default configuration, with placeholders for the settings that have no default."""
    return _composed_once(("name=any", "model.target.name=any"))


def reference(overrides: list[str]) -> DictConfig:
    """Compose conf/ with only the overrides that select files in it. The result defines the valid keys and types."""
    # Ignore `~group`, which deletes required settings, and `stage=...`, which deletes the settings of other stages.
    groups = set(GROUPS) - {"stage"}
    return _composed_once(tuple(o for o in overrides if "=" in o and o.split("=")[0].lstrip("+") in groups))


def preset(group: str, name: str) -> DictConfig:
    """Return the settings of one config file, e.g. ("trainer", "zero2"), merged with those of its base files."""
    return _composed_once((f"{group}={name}",))[group]


def plain(config: DictConfig, *groups: str) -> dict[str, Any]:
    """Return the given groups as plain dictionaries with all interpolations resolved.

    Other groups are left out, because resolving them might import packages that a command does not need.
    """
    return {group: OmegaConf.to_container(config[group], resolve=True) for group in groups}


def as_dict(config: DictConfig) -> dict[str, Any]:
    """Return the settings as a nested dictionary, with interpolations left unresolved."""
    settings: Any = OmegaConf.to_container(config, resolve=False)
    return settings


def leaves(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    """Return (full name, value) for every setting in a nested dictionary. Lists and empty dictionaries are values."""
    if not isinstance(tree, dict) or not tree:
        return [(path, tree)]
    return [leaf for key, value in tree.items() for leaf in leaves(value, f"{path}.{key}" if path else str(key))]


def unresolved(error: OmegaConfBaseException) -> str:
    """Return a one-line error message for an interpolation that cannot be resolved, e.g. `${no.such.key}`."""
    reason = str(error).strip().splitlines()[0]
    return f"{error.full_key}: {reason}" if error.full_key else reason


def unknown_key(key: str, known: dict[str, Any]) -> str:
    """Return the error message for an unknown setting, with its new name, similar settings or the keys in its group."""
    if (name := current_name(key)) != key:
        return f"{key}: this setting was renamed to {name}."
    group, _, last = key.rpartition(".")
    paths = [path for path, _ in leaves(known)]
    if close := get_close_matches(last, {path.rpartition(".")[2] for path in paths}, n=1):
        similar = [path for path in paths if path.rpartition(".")[2] == close[0]]
        siblings = [path for path in similar if path.rpartition(".")[0] == group]
        return f"{key}: no such setting. Did you mean {' or '.join(siblings or similar)}?"
    settings = known
    for part in group.split(".") if group else ():
        settings = settings.get(part, {})
    return f"{key}: no such setting. {group or 'The top level'} contains: {', '.join(map(str, settings))}."


def _unknown_choice(error: MissingConfigException) -> str:
    """Return the error message for a missing file in conf/. Base files (leading `_`) are not offered as choices."""
    group, _, name = str(error.missing_cfg_file).rpartition("/")
    choices = [choice for choice in error.options or () if not choice.startswith("_")]
    if not choices:
        return f"{error.missing_cfg_file}: no such file in conf/."
    return f"{group}={name}: expected one of {', '.join(choices)} (conf/{group}/)."


@cache
def _composed_once(overrides: tuple[str, ...]) -> DictConfig:
    return _compose(list(overrides))


def _compose(overrides: list[str]) -> DictConfig:
    inside = GlobalHydra.instance().is_initialized()  # under hydra.main
    with nullcontext() if inside else initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=overrides)
