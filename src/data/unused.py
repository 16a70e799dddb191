"""Settings that are given and would do nothing, because another setting turns them off."""

from collections.abc import Callable
from dataclasses import dataclass

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


def check_unused(config: DictConfig, overrides: list[str], table: tuple[Unused, ...]) -> None:
    """Only the command line is checked: files of conf/ serve several commands and combinations.

    Raises:
        UserError: an override has no effect, and why.
    """
    for key in [override.split("=")[0].lstrip("+") for override in overrides]:
        for unused in table:
            if unused.holds(key) and unused.when(config):
                raise UserError(f"{key} has no effect: {unused.why}. Leave it out.")
