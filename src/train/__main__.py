"""`python -m train +experiment=tiny`: the command line."""

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
    """One run; as a job of a sweep, returns the drafter's τ."""
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
        if number := received():  # worker pools turn the end that a signal asks for into errors of their own
            stop(number)
        raise


def work(config: DictConfig) -> None:
    """Check the settings, then run the chosen stages.

    Raises:
        UserError: the settings, the data or the run directory do not allow it.
    """
    from train.settings.checks import check_config

    check_config(config)
    if config.plan:
        from train.plan.report import plan

        plan(config)
        return
    # Imported late: a wrong call should not wait for torch.
    from train.pipeline import run

    run(config)


def check_overrides(arguments: list[str]) -> None:
    """Compose once before Hydra does, for a message that names the setting and those that sound like it.

    Raises:
        SystemExit: the overrides do not compose.
    """
    flags = {argument for argument in arguments if argument.startswith("-")}
    if flags - MULTIRUN:
        return  # --help, --cfg ...: Hydra's own business
    overrides = [argument for argument in arguments if argument not in flags]
    try:
        if flags:
            check_jobs(overrides)
        else:
            composed(overrides)
    except UserError as error:
        sys.exit(f"error: {error}")


def quiet() -> None:
    """Keep the terminal for what the user should read."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*num_workers.*")
    warnings.filterwarnings("ignore", message=".*litlogger.*")
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")  # on purpose: no dropout
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")
    warnings.filterwarnings("ignore", message=".*recommended to use `self.log.*")  # these are the same on every rank
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")  # ours is: a function of the step
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    # gloo's worker threads may abort an interpreter that exits while they still hold their last result.
    atexit.register(time.sleep, 0.5)


def options_first(arguments: list[str]) -> list[str]:
    """The same arguments in an order that Hydra's parser takes: it knows no option behind an override."""
    return sorted(arguments, key=lambda argument: argument not in MULTIRUN)


if __name__ == "__main__":
    watch()
    quiet()
    check_overrides(sys.argv[1:])
    sys.argv[1:] = options_first(sys.argv[1:])
    main()
