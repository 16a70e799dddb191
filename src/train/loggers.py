"""W&B without ceremony: offline unless there is a login, one run per stage, the same one after a restart."""

import netrc
import os
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import WandbLogger


class StageWandbLogger(WandbLogger):
    """Lightning's logger, ended with its stage: the next stage's would go on in the same run otherwise."""

    def replay(self, rows: dict[int, dict[str, float]]) -> None:
        """Log what a killed run had logged up to its checkpoint: offline, its last 15 seconds never reached the disk.

        A server would have them; there is nothing to repeat.
        """
        if self._offline:
            for step, row in sorted(rows.items()):
                self.log_metrics(row, step=step)

    def log_directory(self, directory: Path, figures: dict[str, Any]) -> None:
        """A directory as an artifact, by reference to its files as they are now; ends the run."""
        artifact = wandb.Artifact(self.experiment.name, type="drafter", metadata=figures)
        artifact.add_dir(str(directory), policy="immutable")
        self.experiment.log_artifact(artifact)
        self.log_summary(figures)

    def log_summary(self, figures: dict[str, Any]) -> None:
        """Figures of the run as a whole; ends the run."""
        self.experiment.summary.update(figures)
        self.finalize("success")

    def finalize(self, status: str) -> None:
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish()
            self._experiment = None


def logged_in() -> bool:
    """Whether W&B has a key, from its environment variable or from `wandb login`."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc(os.environ.get("NETRC", Path.home() / ".netrc")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host for host in hosts)


def wandb_logger(project: str, save_dir: str, run_name: str, stage: str, run_id: str | None) -> StageWandbLogger:
    """One W&B run per stage, grouped by the run's name. WANDB_MODE and its like keep their meaning.

    Args:
        run_id: the same for every restart of the stage.
    """
    mode = os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
    return StageWandbLogger(
        project=project,
        save_dir=save_dir,
        name=f"{run_name}-{stage}",
        group=run_name,
        job_type=stage,
        id=run_id,
        resume="allow",
        offline=mode in ("offline", "dryrun"),
        mode=mode,
        settings=wandb.Settings(console="off", disable_git=True),  # neither output nor repository leaves the machine
    )
