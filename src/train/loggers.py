"""W&B without ceremony: offline unless there is a login."""

import netrc
import os
from pathlib import Path

from lightning.pytorch.loggers import WandbLogger


def logged_in() -> bool:
    """Whether W&B has a key, from its environment variable or from `wandb login`."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc(os.environ.get("NETRC", Path.home() / ".netrc")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host for host in hosts)


def wandb_logger(project: str, save_dir: str, run_name: str, stage: str) -> WandbLogger:
    """One W&B run per stage, grouped by the run's name. WANDB_MODE and its like keep their meaning."""
    offline = "WANDB_MODE" not in os.environ and not logged_in()
    return WandbLogger(project=project, save_dir=save_dir, name=f"{run_name}-{stage}", group=run_name, offline=offline)
