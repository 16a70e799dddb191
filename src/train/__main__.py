"""Command-line entry point: `python -m train +experiment=tiny`."""

import atexit
import logging
import sys
import time
import warnings

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

import data.threads  # before torch  # noqa: F401
from data.config.compose import CONF, composed, unresolved
from data.errors import UserError
from train.endings.agreed import AgreedEnd
from train.endings.preemption import received, stop, watch
from train.sweep import check_jobs, run_job

MULTIRUN = {"-m", "--multirun"}


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(config: DictConfig) -> float | None:
    """Run the pipeline once. Return the τ of the job's drafter in a sweep, and None otherwise."""
    try:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            return run_job(config, work)
        work(config)
    except AgreedEnd as end:
        end.leave()
    except UserError as error:
        sys.exit(f"error: {error}")
    except OmegaConfBaseException as error:
        sys.exit(f"error: {unresolved(error)}")
    except Exception:
        if number := received():  # worker pools can mask the exit that a signal requested
            stop(number)
        raise
    return None


def work(config: DictConfig) -> None:
    """Check the settings, then run the chosen stages or, with `plan=true`, estimate their cost.

    Raises:
        UserError: the settings, data or run directory are invalid.
    """
    from train.settings.checks import check_config

    check_config(config)
    if config.plan:
        from train.plan.report import plan

        plan(config)
        return
    # Deferred import: an invalid command should fail before torch is imported.
    from train.pipeline import run

    run(config)


def check_overrides(arguments: list[str]) -> None:
    """Compose the configuration before Hydra does, so that errors name the setting and suggest similar names.

    Raises:
        SystemExit: the configuration cannot be composed from the overrides.
    """
    flags = {argument for argument in arguments if argument.startswith("-")}
    if flags - MULTIRUN:
        return  # Hydra handles --help, --cfg etc.
    overrides = [argument for argument in arguments if argument not in flags]
    try:
        if flags:
            check_jobs(overrides)
        else:
            composed(overrides)
    except UserError as error:
        sys.exit(f"error: {error}")


def quiet() -> None:
    """Silence warnings and log messages that are irrelevant to users."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*num_workers.*")
    warnings.filterwarnings("ignore", message=".*litlogger.*")
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")  # intentional: no dropout
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")
    warnings.filterwarnings("ignore", message=".*recommended to use `self.log.*")  # logged values agree on all ranks
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")  # ours is resumable
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    # gloo's worker threads can abort the interpreter if it exits while they still hold their last result.
    atexit.register(time.sleep, 0.5)


def options_first(arguments: list[str]) -> list[str]:
    """Move options before overrides: Hydra's parser rejects an option after an override."""
    return sorted(arguments, key=lambda argument: argument not in MULTIRUN)


if __name__ == "__main__":
    watch()
    quiet()
    check_overrides(sys.argv[1:])
    sys.argv[1:] = options_first(sys.argv[1:])
    main()
