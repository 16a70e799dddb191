"""Detects overrides that have no effect because another setting disables them."""

from collections.abc import Callable
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from data.config.compose import leaves
from data.errors import UserError


@dataclass(frozen=True)
class Unused:
    """Settings that have no effect if `when` returns true for the configuration; `why` is the reason to report."""

    keys: tuple[str, ...]  # full keys or group prefixes
    when: Callable[[DictConfig], bool]
    why: str

    def covers(self, key: str) -> bool:
        return any(key == prefix or key.startswith(f"{prefix}.") for prefix in self.keys)


def keys_given(overrides: list[str]) -> list[str]:
    """Return the full names of all settings assigned by overrides, including those inside `group={key: value}`."""
    keys: list[str] = []
    for override in OverridesParser.create().parse_overrides(overrides):
        if not override.is_delete():
            keys += [key for key, _ in leaves(override.value(), override.key_or_group)]
    return keys


def check_unused(config: DictConfig, overrides: list[str], table: tuple[Unused, ...]) -> None:
    """Check that every override has an effect. Files in conf/ are not checked, since different commands share them.

    Raises:
        UserError: an override has no effect; the message gives the reason.
    """
    for key in keys_given(overrides):
        for unused in table:
            if unused.covers(key) and unused.when(config):
                raise UserError(f"{key} has no effect: {unused.why}. Remove it.")
