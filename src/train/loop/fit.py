"""Run one training stage under Lightning, from scratch or from its latest checkpoint."""

from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning import Trainer
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Timer
from omegaconf import DictConfig
from transformers import PretrainedConfig

from data.errors import UserError
from data.preprocess.packing import PackedRows
from models.cost.flops import step_flops
from train.checkpoint.checkpoints import Checkpoints, checkpointer, not_finished
from train.checkpoint.files import CheckpointFiles, usable_checkpoint
from train.endings.finite import SkippedSteps, callbacks_of
from train.endings.labels import LabelledBlocks
from train.evaluate.plots import read_metrics
from train.loop.callbacks import SameWeights, check_callbacks
from train.loop.datamodule import DraftData
from train.loop.loggers import StageWandbLogger
from train.loop.meta import meta_module
from train.loop.modules import DraftTraining
from train.loop.monitor import Monitor
from train.run_dir.checkpoint_names import step_of
from train.run_dir.state import run_id
from train.settings.derived import ALL, arithmetic, devices, micro_batches_per_step, precision
from train.terminal import say

LOG_EVERY = 10  # steps


def build_trainer(config: DictConfig, stage: str, directory: Path) -> Trainer:
    """Instantiate the trainer preset with this stage's steps, loggers, callbacks and checkpoints.

    Raises:
        UserError: a callback is not supported, or the time limit is not positive.
        ValueError: the global batch does not divide evenly into ranks and micro-batches.
    """
    settings = config.stage[stage]
    validate_every = min(settings.validate_every, settings.steps)
    checkpoints = Checkpoints(
        directory / "checkpoints",
        every=settings.checkpoint_every,
        keep=settings.keep_checkpoints,
        validate_every=validate_every,
        best_by=settings.best_by,
        patience=settings.patience,
        run=run_id(directory.parent, stage),
    )
    given = instantiate(config.callbacks)
    check_callbacks(given)
    skipped = SkippedSteps(checkpoints.directory, settings.max_skipped_steps)
    labelled = LabelledBlocks(needed=config.model.target.name is not None)
    # SLURM provides rank, world size and address. Its signals are handled by train.endings.preemption, because
    # Lightning's handler would save in the middle of a step.
    cluster = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
    trainer: Trainer = instantiate(
        config.trainer,
        devices="auto" if (chosen := devices(config)) == ALL else chosen,
        precision=precision(config),
        max_steps=settings.steps,
        max_epochs=-1,
        gradient_clip_val=settings.gradient_clip,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # the datasets already shard by rank
        enable_model_summary=False,
        log_every_n_steps=1,  # Monitor decides what is logged and how often
        default_root_dir=str(directory),
        logger=stage_loggers(config, stage, directory),
        callbacks=[*given.values(), skipped, labelled, SameWeights(), checkpoints],
        plugins=[CheckpointFiles(), *cluster],
    )
    _check_time_limit(trainer)
    micro_batches = micro_batches_per_step(settings.global_batch_size, settings.micro_batch_size, trainer.world_size)
    trainer.accumulate_grad_batches = micro_batches
    trainer.val_check_interval = validate_every * micro_batches  # Lightning counts micro-batches
    return trainer


def _check_time_limit(trainer: Trainer) -> None:
    """Check that the time limit, if any, is positive.

    Raises:
        UserError: the time limit is zero or negative, so no step would run.
    """
    limits = [callback.time_remaining() for callback in callbacks_of(trainer) if isinstance(callback, Timer)]
    if any(limit is not None and limit <= 0 for limit in limits):
        raise UserError(
            "trainer.max_time (or a Timer's duration) is zero or negative, so no step would run. Set a positive "
            "duration, e.g. trainer.max_time=00:12:00:00 (days:hours:minutes:seconds)."
        )


def stage_loggers(config: DictConfig, stage: str, directory: Path) -> list[Any]:
    """Instantiate the loggers for a stage. A restarted stage resumes its W&B run."""
    run_dir = directory.parent
    places: dict[str, dict[str, Any]] = {"csv": {"save_dir": str(directory)}}
    places["wandb"] = {"save_dir": str(run_dir), "run_name": config.name, "stage": stage}
    places["wandb"]["run_id"] = run_id(run_dir, stage)
    return [instantiate(logger, **places.get(name, {})) for name, logger in config.logger.items()]


def wandb_loggers(config: DictConfig, stage: str, directory: Path) -> list[StageWandbLogger]:
    """Instantiate the loggers for a stage and return only the W&B logger, as a list of length 0 or 1."""
    return [logger for logger in stage_loggers(config, stage, directory) if isinstance(logger, StageWandbLogger)]


def fit(trainer: Trainer, module: DraftTraining, data: DraftData, directory: Path) -> dict[str, float]:
    """Train to the last step, resuming from the latest intact checkpoint if there is one.

    Training may stop earlier if `patience` is set.

    Returns:
        Validation metrics of the weights that the stage outputs: the best weights, or the last ones if no validation
            selected any.

    Raises:
        UserError: Lightning rejects the trainer, logger or callback configuration.
        AgreedEnd: training ended before the last step for a reason other than `patience`.
    """
    checkpoints = checkpointer(trainer)
    chosen = checkpoints.resumed_from = usable_checkpoint(directory / "checkpoints", say, checkpoints.run)
    if chosen:
        step = step_of(chosen)
        say(f"    resuming from step {step}")
        rows = {at: row for at, row in read_metrics(directory).items() if at <= step}
        for logger in trainer.loggers:
            if isinstance(logger, StageWandbLogger):
                logger.replay(rows)
    if not len(data.validation):
        say("    data.validation_records=0: validation is disabled, so the stage outputs its last weights")
    try:
        trainer.fit(module, data, ckpt_path=chosen, weights_only=True)
    except MisconfigurationException as error:
        raise UserError(f"Lightning rejected the trainer, logger or callback settings: {error}") from error
    finally:
        data.close()
    early = trainer.global_step < trainer.max_steps
    if early and not checkpoints.out_of_patience():
        raise not_finished(trainer, directory / "checkpoints")  # ended before its first step, so no callback raised
    if early:
        say(f"    stopped early at step {trainer.global_step}: {checkpoints.best_by} has stopped improving")
    return checkpoints.figures()


def stage_monitor(config: DictConfig, stage: str, target_config: PretrainedConfig, training: PackedRows) -> Monitor:
    """Create the metrics monitor for a stage. It omits MFU if the architecture cannot be traced."""
    settings, length = config.stage[stage], config.data.max_seq_len
    rows, block_size = settings.global_batch_size, config.model.draft.block_size
    try:
        module = meta_module(config, stage, target_config)
        parts = step_flops(
            module.loss,
            module.draft,
            rows=rows,
            max_seq_len=length,
            num_anchors=settings.num_anchors,
            clean_pairs=rows * training.pairs / len(training),
            mask_pairs=rows * settings.num_anchors * block_size * (training.pairs / training.tokens + block_size),
        )
    except ValueError:
        flops = None
    else:
        flops = sum(parts.values())
    dtype = getattr(torch, arithmetic(config))
    return Monitor(every=LOG_EVERY, rows=rows, tokens=rows * length, flops=flops, dtype=dtype)
