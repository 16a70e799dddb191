"""W&B logging.

W&B's environment variables override the defaults chosen here. Logging is offline unless credentials are available and
the server is reachable. W&B errors never stop training. wandb is imported lazily, so only runs that use it require it.
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
from omegaconf import DictConfig

from data.errors import UserError
from train.terminal import rank, say

PROJECT = "flexdraft"  # default if neither logger.wandb.project nor WANDB_PROJECT is set
REACH, INIT, FINISH = 5.0, 30.0, 120.0  # timeouts in seconds: health check, wandb.init, final upload
OFFLINE = ("offline", "dryrun")


def guarded(method: Callable[..., None]) -> Callable[..., None]:
    """Wrap a logger method so that an error disables W&B for this stage instead of stopping training."""

    @wraps(method)
    def call(self: "StageWandbLogger", *args: Any, **kwargs: Any) -> None:
        if self.lost or rank():
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:  # a network or W&B error must not end the training run
            self.lost = True
            say(f"W&B: {_line(error)} Logging to W&B is disabled for this stage; the run continues.")

    return call


class StageWandbLogger(WandbLogger):
    """Lightning's W&B logger for one stage.

    Each stage logs to a separate W&B run, which is finished when the stage ends. If WANDB_RUN_ID is set (e.g. by
    `wandb agent`), all stages log to that run instead: metric keys are prefixed with the stage name, and the run stays
    open until the process exits.
    """

    def __init__(self, stage: str, **settings: Any) -> None:
        super().__init__(**settings)
        self.stage, self.shared, self.lost = stage, bool(os.environ.get("WANDB_RUN_ID")), False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, created on first access. Falls back to offline mode if the server rejects it."""
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
        begin: dict[str, Any] = {} if self.shared else {"reinit": "create_new"}
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
        """In offline mode, re-log the metrics that an interrupted run had logged up to its checkpoint.

        Offline, metrics from the last 15 seconds before a kill never reach the disk. Online, the server already has
        all of them.

        Args:
            rows: metrics, keyed by step.
        """
        if self._offline:
            for step, row in sorted(rows.items()):
                self.log_metrics(row, step=step)

    @guarded
    def log_directory(self, directory: Path, figures: dict[str, Any]) -> None:
        """Log a snapshot of a directory as an artifact, then finish the run."""
        import wandb

        artifact = wandb.Artifact(self.experiment.name or self.stage, type="drafter", metadata=figures)
        artifact.add_dir(str(directory), policy="immutable")
        self.experiment.log_artifact(artifact)
        self.log_summary(figures)

    @guarded
    def log_summary(self, figures: dict[str, Any]) -> None:
        """Write the final metrics to the run's summary, then finish the run."""
        self.experiment.summary.update({self._key(name): value for name, value in figures.items()})
        self.finalize("success")

    @guarded
    def finalize(self, status: str) -> None:
        run, self._experiment = self._experiment, None
        if run is None or self.shared:
            return
        # Finish in a thread with a timeout, so that an unreachable server does not hold up the next stage.
        thread = threading.Thread(target=_quietly, args=(run.finish,), daemon=True)
        thread.start()
        thread.join(FINISH)
        if thread.is_alive():
            say(
                f"W&B: the upload did not finish within {FINISH:.0f} s. To finish it later: "
                f"wandb sync {self._wandb_init['dir']}/wandb/*run-*"
            )


def _quietly(call: Callable[[], Any]) -> None:
    try:
        call()
    except Exception as error:
        say(f"W&B: {_line(error)}")


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".") + "."


def _later(directory: str) -> str:
    return f"Logging offline. To upload later: wandb sync {directory}/wandb/offline-run-*"


@cache
def mode(directory: str) -> str:
    """Return the W&B mode for this process. The result is cached.

    If WANDB_MODE or W&B's own settings ask for offline or disabled logging, that mode is used. Otherwise the mode is
    WANDB_MODE (default: online) if credentials are available and the server is reachable, and offline if not.

    Raises:
        UserError: WANDB_MODE or another WANDB_* variable is invalid, or wandb is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"logger=wandb: {error}. Install wandb (pip install wandb) or use logger=csv.") from error
    given, known = os.environ.get("WANDB_MODE"), get_args(wandb.Settings.model_fields["mode"].annotation)
    if given and given not in known:
        raise UserError(f"WANDB_MODE={given}: expected one of {', '.join(known)}.")
    try:
        settings = wandb.setup().settings
    except Exception as error:  # e.g. an invalid WANDB_* variable
        raise UserError(f"W&B rejected the settings in the WANDB_* variables: {_line(error)}") from error
    if given in (*OFFLINE, "disabled") or settings.mode in (*OFFLINE, "disabled"):
        return given or settings.mode
    if not logged_in(settings.base_url):
        if given:
            say(
                f"W&B: WANDB_MODE={given}, but no credentials were found (run wandb login or set WANDB_API_KEY). "
                f"{_later(directory)}"
            )
        return "offline"
    if problem := unreachable(settings.base_url):
        say(f"W&B: {settings.base_url} is unreachable ({problem}). {_later(directory)}")
        return "offline"
    return given or "online"


def logged_in(base_url: str) -> bool:
    """Return whether W&B credentials are available, from environment variables or from `wandb login` (.netrc)."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        hosts = netrc.netrc(os.environ.get("NETRC", Path.home() / ".netrc")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return urlsplit(base_url).hostname in hosts


def unreachable(base_url: str) -> str:
    """Return why the server is unreachable, or an empty string if it responds within `REACH` seconds."""
    import httpx

    outcome = [f"no response within {REACH:.0f} s"]

    def ask() -> None:
        try:
            status = httpx.get(f"{base_url}/healthz", timeout=REACH).status_code
            outcome[0] = "" if status < 500 else f"HTTP status {status}"
        except Exception as error:
            outcome[0] = _line(error).rstrip(".")

    thread = threading.Thread(target=ask, daemon=True)  # DNS lookups have no timeout
    thread.start()
    thread.join(REACH + 1)
    return outcome[0]


def check_loggers(config: DictConfig) -> None:
    """Validate the W&B setup and choose its mode before anything is loaded.

    Raises:
        UserError: see `mode`.
    """
    if rank() == 0 and "wandb" in config.logger:
        mode(_directory(config.run_dir))


def _directory(run_dir: str) -> str:
    return os.environ.get("WANDB_DIR") or run_dir


def wandb_logger(
    save_dir: str, run_name: str, stage: str, run_id: str | None, project: str | None = None
) -> StageWandbLogger:
    """Create the W&B logger for a stage.

    The W&B run takes its name and group from the training run. W&B's environment variables override name, group and
    job type.

    Args:
        save_dir: the run directory; overridden by WANDB_DIR.
        run_id: id of the W&B run, stable across restarts of the stage; overridden by WANDB_RUN_ID.
        project: W&B project; defaults to WANDB_PROJECT, or else `flexdraft`.

    Raises:
        UserError: see `mode`.
    """
    directory = _directory(save_dir)
    chosen = mode(directory) if rank() == 0 else "disabled"

    def unless(variable: str, value: str | None) -> str | None:
        return None if os.environ.get(variable) else value  # with None, W&B reads the variable

    import wandb

    shared = bool(os.environ.get("WANDB_RUN_ID"))  # one W&B run for all stages
    timeout: dict[str, Any] = {} if os.environ.get("WANDB_INIT_TIMEOUT") else {"init_timeout": INIT}
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
        # Do not upload console output or git state.
        settings=wandb.Settings(console="off", disable_git=True, **timeout),
    )
