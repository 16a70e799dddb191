"""Short runs that stop at a chosen step, and their recorded metrics."""

import random
from dataclasses import replace

import numpy as np
import torch
from helpers.shared import random_target
from helpers.training import data, module, trainer

from train.checkpoint import checkpoints
from train.checkpoint.checkpoints import Checkpoints
from train.checkpoint.files import CheckpointFiles, usable_checkpoint
from train.endings import preemption
from train.endings.finite import SkippedSteps
from train.loop.modules import AttentionTuning
from train.loop.monitor import Monitor

STEPS = 8


class History(Monitor):
    """Record losses by step and validations instead of logging them."""

    def __init__(self) -> None:
        super().__init__(every=1, rows=4, tokens=1, flops=None, dtype=torch.float32)
        self.losses, self.validations, self.drawn = {}, [], {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self.losses[trainer.global_step] = pl_module.step.loss
        self.drawn[trainer.global_step] = (random.random(), np.random.random(), float(torch.rand(())))

    def on_validation_end(self, trainer, pl_module):
        self.validations.append(trainer.global_step)


def run(
    directory, *, stop_at: int | None = None, monkeypatch=None, micro_batches: int = 1, keep: int = 2,
    validate_every: int = 2, faults=(), most: int = 5, stage=AttentionTuning, **kept
):  # fmt: skip
    """Train the small target's drafter; optionally stop at a step, as on a signal.

    Args:
        faults: callbacks that inject faults.
        most: number of consecutive skipped steps that ends the run.
        kept: further arguments of `Checkpoints`.
    """
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(1)
    history = History()
    kept = {"best_by": "val/tau_estimate"} | kept
    checkpointer = Checkpoints(directory, every=3, keep=keep, validate_every=validate_every, **kept)
    fitted = trainer(
        directory, STEPS, val_check_interval=validate_every * micro_batches, check_val_every_n_epoch=None,
        enable_checkpointing=True,
        callbacks=[history, *faults, SkippedSteps(directory, most), checkpointer], plugins=[CheckpointFiles()],
    )  # fmt: skip
    fitted.accumulate_grad_batches = micro_batches
    training, rows = module(stage, random_target()), data(STEPS)
    rows.settings = replace(rows.settings, micro_batch_size=4 // micro_batches)
    chosen = usable_checkpoint(directory)
    if stop_at:
        asked = lambda strategy: 10 if fitted.global_step >= stop_at else 0  # noqa: E731  SIGUSR1
        monkeypatch.setattr(checkpoints, "agreed_signal", asked)
    try:
        fitted.fit(training, rows, ckpt_path=chosen, weights_only=True)
    finally:
        monkeypatch.undo() if monkeypatch else None
        preemption.set_training(False)
    return training, checkpointer, history
