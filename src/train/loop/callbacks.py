"""Restrictions on user callbacks that ensure a stage outputs the same weights that it validated."""

from typing import Any, cast

import lightning
import torch
from lightning.pytorch.callbacks import (
    Callback,
    Checkpoint,
    DeviceStatsMonitor,
    EarlyStopping,
    LambdaCallback,
    LearningRateMonitor,
    ModelSummary,
    ProgressBar,
    ThroughputMonitor,
    Timer,
)
from torch import Tensor

from data.errors import UserError
from train.endings.agreed import AgreedEnd
from train.endings.finite import callbacks_of
from train.loop.modules import DraftTraining

# Lightning callbacks that only observe training, plus `Timer`, which limits its duration. The others change the
# weights, the optimization or the number of steps.
KNOWN: tuple[type[Callback], ...] = (DeviceStatsMonitor, LambdaCallback, LearningRateMonitor, ModelSummary, ProgressBar)
KNOWN += (ThroughputMonitor, Timer)
OF_CHECKPOINTS = ("on_save_checkpoint", "on_load_checkpoint")


def check_callbacks(callbacks: dict[str, Any]) -> None:
    """Check that the user's callbacks are supported, based on their base classes and overridden hooks, not their names.

    Raises:
        UserError: an entry is not a Callback, saves checkpoints, changes their content, stops training early based on a
            metric, or is a Lightning callback that changes training.
    """
    for name, callback in callbacks.items():
        here = f"callbacks.{name}: {type(callback).__name__}"
        if not isinstance(callback, Callback):
            raise UserError(f"{here} is not a lightning.pytorch.callbacks.Callback.")
        if isinstance(callback, Checkpoint):
            raise UserError(
                f"{here} saves checkpoints, which each stage already does. Remove it and configure "
                "stage.<stage>.checkpoint_every, .keep_checkpoints and .best_by instead (docs/guide/scaling.md)."
            )
        if isinstance(callback, EarlyStopping):
            raise UserError(
                f"{here} would stop training without finishing the stage. Remove it and set stage.<stage>.patience "
                "instead, the number of validations without an improvement in stage.<stage>.best_by."
            )
        if any(_overrides(callback, hook) for hook in OF_CHECKPOINTS):
            raise UserError(
                f"{here} changes the content of checkpoints (it overrides {' or '.join(OF_CHECKPOINTS)}), as weight "
                "averaging does, so the final weights would not be the validated ones. Remove it. To save a callback's "
                "own state, implement state_dict and load_state_dict."
            )
        if unknown := _unknown(type(callback)):
            raise UserError(
                f"{here} is not supported, because {unknown.__name__} changes training. Remove it. "
                f"Supported Lightning callbacks: {', '.join(kind.__name__ for kind in KNOWN)}."
            )


def _overrides(callback: Callback, hook: str) -> bool:
    return hook in vars(callback) or getattr(type(callback), hook) is not getattr(Callback, hook)


def _unknown(kind: type) -> type | None:
    """Return the first Lightning class in the callback's MRO that is not derived from a `KNOWN` class, or None."""
    package = Callback.__module__.rpartition(".")[0]  # lightning.pytorch.callbacks
    own = [c for c in kind.__mro__ if c.__module__.startswith(package) and c is not Callback]
    return next((c for c in own if not issubclass(c, KNOWN)), None)


class SameWeights(Callback):
    """Checks that the weights saved after a validation and at the end of training are the validated weights.

    Must come after all user callbacks and before the checkpoint callback.
    """

    def __init__(self) -> None:
        self._step, self._norms = -1, torch.zeros(0)

    def on_validation_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if batch_idx == 0:
            self._step, self._norms = trainer.global_step, _norms(pl_module)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._compare(trainer, pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._compare(trainer, pl_module)

    def _compare(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Compare the parameter norms with those recorded at the start of validation, if this step was validated.

        Raises:
            AgreedEnd: the weights differ from those validated at this step.
        """
        changed = trainer.global_step == self._step and not self._norms.equal(_norms(pl_module))
        if trainer.strategy.reduce_boolean_decision(changed, all=False):
            given = [type(c).__name__ for c in callbacks_of(trainer) if not type(c).__module__.startswith("train.")]
            raise AgreedEnd(
                f"Step {trainer.global_step}: a callback changed the trained weights during or after validation, so "
                "the validation metrics do not match the weights about to be saved. Remove that callback. Configured "
                f"callbacks: {', '.join(given)}."
            )


def _norms(module: lightning.LightningModule) -> Tensor:
    """Return the norm of each trained parameter (under ZeRO 3, of this rank's shard) as a CPU tensor [parameters].

    NaN is replaced with -1 so that two NaN norms compare equal.
    """
    pieces = [
        getattr(parameter, "ds_tensor", parameter).detach()
        for parameter in cast(DraftTraining, module).trained().values()
    ]
    return torch.stack(torch._foreach_norm(pieces)).nan_to_num(nan=-1.0).cpu()
