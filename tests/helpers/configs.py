"""Composed configurations."""

from helpers.shared import ROOT
from hydra import compose, initialize_config_dir

import train.__main__  # noqa: F401  registers the `root` resolver

CONF = ROOT / "conf"


def composed(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))
