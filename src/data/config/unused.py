"""Settings that are given and would do nothing, because another setting turns them off."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from data.errors import UserError


@dataclass(frozen=True)
class Unused:
    """Settings that have no effect where `when` holds."""

    keys: tuple[str, ...]  # whole keys, or groups of them
    when: Callable[[DictConfig], bool]
    why: str

    def holds(self, key: str) -> bool:
        return any(key == own or key.startswith(f"{own}.") for own in self.keys)


def keys_given(overrides: list[str]) -> list[str]:
    """The settings that these overrides give a value, each by its whole name, also within `group={key: value}`."""
    keys = []
    for override in OverridesParser.create().parse_overrides(overrides):
        keys += [] if override.is_delete() else _leaves(override.key_or_group, override.value())
    return keys


def _leaves(key: str, value: Any) -> list[str]:
    if not isinstance(value, dict) or not value:
        return [key]
    return [leaf for name, part in value.items() for leaf in _leaves(f"{key}.{name}", part)]


def check_unused(config: DictConfig, overrides: list[str], table: tuple[Unused, ...]) -> None:
    """Only the command line is checked: files of conf/ serve several commands and combinations.

    Raises:
        UserError: an override has no effect, and why.
    """
    for key in keys_given(overrides):
        for unused in table:
            if unused.holds(key) and unused.when(config):
                raise UserError(f"{key} has no effect: {unused.why}. Leave it out.")
