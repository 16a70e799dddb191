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


def cpu_precision() -> str:
    """Lightning's precision for training on this CPU: bfloat16 where it is native, float32 elsewhere."""
    import torch

    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if native else "32-true"


OmegaConf.register_new_resolver("root", lambda: str(ROOT), replace=True)
OmegaConf.register_new_resolver("cpu_precision", cpu_precision, replace=True)


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
    with initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            compose("config", overrides=arguments)
        except HydraException as error:
            sys.exit(f"error: {_explain(error, arguments)}")


def _explain(error: HydraException, arguments: list[str]) -> str:
    from train.checks import known_settings, unknown_key

    key = getattr(error.__cause__, "full_key", None)
    return unknown_key(str(key), known_settings(arguments)) if key else str(error).strip()


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
