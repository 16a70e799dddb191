"""`python -m train +experiment=tiny`: the command line."""

import atexit
import logging
import sys
import time
import warnings
from pathlib import Path

import hydra
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from data.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
OmegaConf.register_new_resolver("root", lambda: str(ROOT), replace=True)


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


def check_overrides(arguments: list[str]) -> None:
    """Compose once before Hydra does, for a message that names the setting and the closest one that exists.

    Raises:
        SystemExit: the overrides do not compose.
    """
    if any(argument.startswith("-") for argument in arguments):
        return  # --help, --multirun, --cfg ...: Hydra's own business
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            compose("config", overrides=arguments)
    except HydraException as error:
        sys.exit(f"error: {_explain(error)}")


def _explain(error: HydraException) -> str:
    from train.checks import unknown_key

    cause = error.__cause__
    key = getattr(cause, "full_key", None)
    parent = getattr(cause, "parent_node", None)
    if key and isinstance(parent, DictConfig):
        return unknown_key(str(key), list(parent), str(key).rpartition(".")[0])
    return str(error).strip()


def quiet() -> None:
    """Keep the terminal for what the user should read."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*num_workers.*")
    warnings.filterwarnings("ignore", message=".*litlogger.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    # gloo's worker threads may abort an interpreter that exits while they still hold their last result.
    atexit.register(time.sleep, 0.5)


if __name__ == "__main__":
    quiet()
    check_overrides(sys.argv[1:])
    main()
