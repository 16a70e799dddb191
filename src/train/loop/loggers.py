"""W&B: its own environment variables hold; offline unless there is a login and a server; it never ends a training.

wandb is imported where it is used, so that runs without it do not need it.
"""

import netrc
import os
import threading
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig

from data.errors import UserError
from train.terminal import say

PROJECT = "flexdraft"  # unless logger.wandb.project or WANDB_PROJECT names one
REACH, INIT, FINISH = 5.0, 30.0, 120.0  # seconds to wait for the server
OFFLINE = ("offline", "dryrun")


def guarded(method: Callable[..., None]) -> Callable[..., None]:
    """A method of the logger after whose failure the training goes on, without W&B."""

    @wraps(method)
    def call(self: "StageWandbLogger", *args: Any, **kwargs: Any) -> None:
        if self.lost or rank_zero_only.rank:
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:  # of the network, of W&B's own process: whatever it is, the training is worth more
            self.lost = True
            say(f"W&B: {_line(error)} Nothing more goes to it from this stage; the run itself goes on.")

    return call


class StageWandbLogger(WandbLogger):
    """Lightning's logger for one stage.

    Each stage is a run, ended with it. Where the run is given (WANDB_RUN_ID, as under `wandb agent`), all stages share
    it: their keys begin with the stage's name, and it stays open until the process ends.
    """

    def __init__(self, stage: str, **settings: Any) -> None:
        super().__init__(**settings)
        self.stage, self.shared, self.lost = stage, bool(os.environ.get("WANDB_RUN_ID")), False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run at W&B, begun when it is first asked for; offline if the server does not take it."""
        if self._experiment is None:
            self._experiment = self._begin()
            step = self._key("trainer/global_step")
            self._experiment.define_metric(step)
            self._experiment.define_metric(self._key("*"), step_metric=step)
        return self._experiment

    def _begin(self) -> Any:
        import wandb

        if self.shared and wandb.run is not None:
            return wandb.run
        begin = {} if self.shared else {"reinit": "create_new"}
        try:
            return wandb.init(**self._wandb_init, **begin)
        except Exception as error:
            if self._wandb_init["mode"] in OFFLINE:
                raise
            say(f"W&B: {_line(error)} {_later(self._wandb_init['dir'])}")
            self._offline = True
            self._wandb_init["mode"] = "offline"
            return wandb.init(**self._wandb_init, **begin)

    def _key(self, name: str) -> str:
        return f"{self.stage}/{name}" if self.shared else name

    @guarded
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        at = {} if step is None else {"trainer/global_step": step}
        self.experiment.log({self._key(name): value for name, value in (metrics | at).items()})

    @guarded
    def log_hyperparams(self, params: dict[str, Any]) -> None:
        super().log_hyperparams(params)

    def replay(self, rows: dict[int, dict[str, float]]) -> None:
        """Log what a killed run had logged up to its checkpoint: offline, its last 15 seconds never reached the disk.

        A server would have them; there is nothing to repeat.
        """
        if self._offline:
            for step, row in sorted(rows.items()):
                self.log_metrics(row, step=step)

    @guarded
    def log_directory(self, directory: Path, figures: dict[str, Any]) -> None:
        """A directory as an artifact, by reference to its files as they are now; ends the run."""
        import wandb

        artifact = wandb.Artifact(self.experiment.name or self.stage, type="drafter", metadata=figures)
        artifact.add_dir(str(directory), policy="immutable")
        self.experiment.log_artifact(artifact)
        self.log_summary(figures)

    @guarded
    def log_summary(self, figures: dict[str, Any]) -> None:
        """Figures of the run as a whole; ends the run."""
        self.experiment.summary.update({self._key(name): value for name, value in figures.items()})
        self.finalize("success")

    @guarded
    def finalize(self, status: str) -> None:
        run, self._experiment = self._experiment, None
        if run is None or self.shared:
            return
        # A thread, since W&B waits for a server that has gone away, much longer than the next stage should.
        thread = threading.Thread(target=_quietly, args=(run.finish,), daemon=True)
        thread.start()
        thread.join(FINISH)
        if thread.is_alive():
            say(f"W&B: the server has not taken everything within {FINISH:.0f} s. {_later(self._wandb_init['dir'])}")


def _quietly(call: Callable[[], Any]) -> None:
    try:
        call()
    except Exception as error:
        say(f"W&B: {_line(error)}")


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".") + "."


def _later(directory: str) -> str:
    return f"Logging offline; later: wandb sync {directory}/wandb/offline-run-*"


@cache
def mode(directory: str) -> str:
    """W&B's mode for this process, decided once: online if there is a login and the server answers, else offline.

    Raises:
        UserError: WANDB_MODE is none of W&B's modes, or wandb is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"logger=wandb: {error}. Install it (pip install wandb), or choose logger=csv.") from error
    given, known = os.environ.get("WANDB_MODE"), get_args(wandb.Settings.model_fields["mode"].annotation)
    if given and given not in known:
        raise UserError(f"WANDB_MODE={given}: expected one of {', '.join(known)}.")
    try:
        settings = wandb.setup().settings
    except Exception as error:  # of a variable that it does not understand, for example
        raise UserError(f"W&B does not take its settings (WANDB_* variables): {_line(error)}") from error
    if given in (*OFFLINE, "disabled") or settings.mode in (*OFFLINE, "disabled"):
        return given or settings.mode
    if not logged_in(settings.base_url):
        if given:
            say(f"W&B: WANDB_MODE={given}, but there is no login (wandb login, WANDB_API_KEY). {_later(directory)}")
        return "offline"
    if problem := unreachable(settings.base_url):
        say(f"W&B: {settings.base_url} is out of reach ({problem}). {_later(directory)}")
        return "offline"
    return given or "online"


def logged_in(base_url: str) -> bool:
    """Whether W&B has a key: from its environment variables, or from `wandb login`."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        hosts = netrc.netrc(os.environ.get("NETRC", Path.home() / ".netrc")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return urlsplit(base_url).hostname in hosts


def unreachable(base_url: str) -> str:
    """Why a server does not answer within a few seconds; empty if it does."""
    import httpx

    outcome = [f"no answer within {REACH:.0f} s"]

    def ask() -> None:
        try:
            status = httpx.get(f"{base_url}/healthz", timeout=REACH).status_code
            outcome[0] = "" if status < 500 else f"HTTP status {status}"
        except Exception as error:
            outcome[0] = _line(error).rstrip(".")

    thread = threading.Thread(target=ask, daemon=True)  # looking up a name has no time limit
    thread.start()
    thread.join(REACH + 1)
    return outcome[0]


def check_loggers(config: DictConfig) -> None:
    """Decide on W&B before anything is loaded.

    Raises:
        UserError: as for `mode`.
    """
    if rank_zero_only.rank == 0 and "wandb" in config.logger:
        mode(_directory(config.run_dir))


def _directory(run_dir: str) -> str:
    return os.environ.get("WANDB_DIR") or run_dir


def wandb_logger(
    save_dir: str, run_name: str, stage: str, run_id: str | None, project: str | None = None
) -> StageWandbLogger:
    """The logger of a stage: a run at W&B named and grouped by the run's name, unless W&B's variables say otherwise.

    Args:
        save_dir: the run directory; WANDB_DIR comes before it.
        run_id: the same for every restart of the stage; WANDB_RUN_ID comes before it.
        project: None: WANDB_PROJECT, or else `flexdraft`.

    Raises:
        UserError: as for `mode`.
    """
    directory = _directory(save_dir)
    chosen = mode(directory) if rank_zero_only.rank == 0 else "disabled"

    def unless(variable: str, value: str | None) -> str | None:
        return None if os.environ.get(variable) else value  # None leaves it to W&B

    import wandb

    shared = bool(os.environ.get("WANDB_RUN_ID"))  # by all stages
    timeout = {} if os.environ.get("WANDB_INIT_TIMEOUT") else {"init_timeout": INIT}
    return StageWandbLogger(
        stage,
        project=project or os.environ.get("WANDB_PROJECT") or PROJECT,
        save_dir=directory,
        name=unless("WANDB_NAME", run_name if shared else f"{run_name}-{stage}"),
        group=unless("WANDB_RUN_GROUP", run_name),
        job_type=unless("WANDB_JOB_TYPE", None if shared else stage),
        id=unless("WANDB_RUN_ID", run_id),
        resume=os.environ.get("WANDB_RESUME") or "allow",
        offline=chosen in OFFLINE,
        mode=chosen,
        # Neither output nor repository leaves the machine.
        settings=wandb.Settings(console="off", disable_git=True, **timeout),
    )
