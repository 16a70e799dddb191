"""One training stage with Lightning: from where it was left to its last step."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig
from torch import nn

from train.datamodule import DraftData
from train.modules import DraftTraining


def build_trainer(config: DictConfig, stage: str, directory: Path) -> Trainer:
    """The trainer preset with this stage's steps, loggers and checkpoints."""
    settings = config.stage[stage]
    checkpoints = ModelCheckpoint(
        dirpath=directory / "checkpoints", filename="{step:08d}", every_n_train_steps=settings.checkpoint_every
    )
    return instantiate(
        config.trainer,
        max_steps=settings.steps,
        max_epochs=-1,
        gradient_clip_val=settings.gradient_clip,
        val_check_interval=min(settings.validate_every, settings.steps),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        use_distributed_sampler=False,  # the loaders know their rank
        enable_model_summary=False,
        default_root_dir=str(directory),
        logger=_loggers(config, stage, directory),
        callbacks=[*instantiate(config.callbacks).values(), checkpoints],
    )


def _loggers(config: DictConfig, stage: str, directory: Path) -> list[Any]:
    places = {"csv": {"save_dir": str(directory)}}
    places["wandb"] = {"save_dir": str(directory), "run_name": config.name, "stage": stage}
    return [instantiate(logger, **places.get(name, {})) for name, logger in config.logger.items()]


def last_checkpoint(directory: Path) -> Path | None:
    """The checkpoint of the greatest step, if the stage was interrupted."""
    return max((directory / "checkpoints").glob("step=*.ckpt"), default=None)


def fit(trainer: Trainer, module: DraftTraining, data: DraftData, directory: Path) -> dict[str, float]:
    """Train to the last step, from the last checkpoint if there is one; returns the figures of the last validation."""
    trainer.fit(module, data, ckpt_path=last_checkpoint(directory), weights_only=True)
    return {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}


def gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager:
    """Whole parameters inside the context, also where ZeRO 3 keeps only a piece on each rank. Enter on every rank."""
    parameters = list(parameters)
    if any(hasattr(p, "ds_id") for p in parameters):
        import deepspeed  # seconds to import, and only ZeRO 3 needs it

        return deepspeed.zero.GatheredParameters(parameters)
    return nullcontext()
