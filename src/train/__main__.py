"""`python -m train +experiment=tiny`: the command line."""

import atexit
import logging
import sys
import time
import warnings

import hydra
from omegaconf import DictConfig

from data.configuration import CONF, composed
from data.errors import UserError


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(config: DictConfig) -> None:
    """Check the settings, then run the chosen stages."""
    from train.checks import check_config

    try:
        check_config(config)
        # Imported late: a wrong call should not wait for torch.
        from train.pipeline import run

        run(config)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from the last checkpoint")


def check_overrides(arguments: list[str]) -> None:
    """Compose once before Hydra does, for a message that names the setting and those that sound like it.

    Raises:
        SystemExit: the overrides do not compose.
    """
    if any(argument.startswith("-") for argument in arguments):
        return  # --help, --multirun, --cfg ...: Hydra's own business
    try:
        composed(arguments)
    except UserError as error:
        sys.exit(f"error: {error}")


def quiet() -> None:
    """Keep the terminal for what the user should read."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*num_workers.*")
    warnings.filterwarnings("ignore", message=".*litlogger.*")
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")  # on purpose: no dropout
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")  # ours is: a function of the step
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    # gloo's worker threads may abort an interpreter that exits while they still hold their last result.
    atexit.register(time.sleep, 0.5)


if __name__ == "__main__":
    quiet()
    check_overrides(sys.argv[1:])
    main()
