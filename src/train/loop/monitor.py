"""Training metrics: loss, learning rate, throughput, MFU, peak memory."""

import resource
import time
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from models.cost.hardware import peak_flops
from train.endings.finite import latest_step


class Monitor(Callback):
    """Logs a row of metrics every `every` steps, after synchronizing the device."""

    def __init__(self, *, every: int, rows: int, tokens: int, flops: float | None, dtype: torch.dtype) -> None:
        """
        Args:
            every: steps between logged rows.
            rows, tokens: packed rows and tokens per step, across all ranks.
            flops: floating-point operations per step, across all ranks; None if they cannot be counted.
            dtype: compute dtype, which determines the peak FLOP/s.
        """
        self.every, self.rows, self.tokens, self.flops, self.dtype = every, rows, tokens, flops, dtype
        self.peak = 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.flops:
            self.peak = peak_flops(trainer.strategy.root_device, self.dtype) * trainer.world_size
        self._mark(trainer)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        _wait(trainer)
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        _wait(trainer)
        self._since += time.perf_counter() - self._paused  # exclude validation from the rates

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._rate = trainer.optimizers[0].param_groups[0]["lr"]  # before the scheduler advances it

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches or trainer.global_step % self.every:
            return
        _wait(trainer)
        rate = (trainer.global_step - self._step) / (time.perf_counter() - self._since)
        step = latest_step(pl_module)
        made = {"train/loss": step.loss, "train/gradient_norm": step.gradient_norm}
        figures = {
            **({} if step.fault else made),  # a skipped step has no meaningful loss or gradient norm
            "train/learning_rate": self._rate,
            "speed/steps_per_second": rate,
            "speed/rows_per_second": rate * self.rows,
            "speed/tokens_per_second": rate * self.tokens,
            "memory/peak_gb": _peak_bytes(trainer) / 1e9,
        }
        if self.flops:
            figures["speed/mfu"] = rate * self.flops / self.peak
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step)
        shown = {"loss": step.loss, "tokens/s": figures["speed/tokens_per_second"]}
        if self.flops:
            shown["MFU %"] = 100 * figures["speed/mfu"]
        pl_module.log_dict(shown, prog_bar=True, logger=False)
        self._mark(trainer)

    def _mark(self, trainer: lightning.Trainer) -> None:
        self._step, self._since = trainer.global_step, time.perf_counter()


def _wait(trainer: lightning.Trainer) -> None:
    """Block until all queued GPU work is finished."""
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize()


def _peak_bytes(trainer: lightning.Trainer) -> int:
    """Return the peak memory in bytes: allocated GPU memory or, on CPU, the resident set size of the process."""
    if trainer.strategy.root_device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
