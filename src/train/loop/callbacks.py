"""Callbacks of the user's: what they may do, so that the figures of a stage are of the weights that it hands on."""

from typing import Any

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

# Of Lightning's, those that watch a training, and its time limit; others change what is trained, how, or how long.
KNOWN = (DeviceStatsMonitor, LambdaCallback, LearningRateMonitor, ModelSummary, ProgressBar)
KNOWN += (ThroughputMonitor, Timer)
OF_CHECKPOINTS = ("on_save_checkpoint", "on_load_checkpoint")


def check_callbacks(callbacks: dict[str, Any]) -> None:
    """By what a callback's class is and overrides, not by its name.

    Raises:
        UserError: a callback saves checkpoints, changes what they hold, ends the training by a figure, or is one of
            Lightning's that change training.
    """
    for name, callback in callbacks.items():
        here = f"callbacks.{name}: {type(callback).__name__}"
        if not isinstance(callback, Callback):
            raise UserError(f"{here} is no lightning.pytorch.callbacks.Callback.")
        if isinstance(callback, Checkpoint):
            raise UserError(
                f"{here} saves checkpoints of its own. Leave it out: the stage saves its own; see "
                "stage.<stage>.checkpoint_every, .keep_checkpoints and .best_by (docs/guide/scaling.md)."
            )
        if isinstance(callback, EarlyStopping):
            raise UserError(
                f"{here} would end the training without finishing the stage. Leave it out and set "
                "stage.<stage>.patience, the number of validations without a better stage.<stage>.best_by."
            )
        if any(_overrides(callback, hook) for hook in OF_CHECKPOINTS):
            raise UserError(
                f"{here} changes what checkpoints hold ({' or '.join(OF_CHECKPOINTS)}), as the averaging of weights "
                "does: the weights handed on would not be those of the figures. Leave it out; a callback may keep "
                "values of its own by state_dict and load_state_dict."
            )
        if unknown := _unknown(type(callback)):
            raise UserError(
                f"{here}: {unknown.__name__} changes what is trained, which the stages do not follow. Leave it out. "
                f"Of Lightning's own, these are followed: {', '.join(kind.__name__ for kind in KNOWN)}."
            )


def _overrides(callback: Callback, hook: str) -> bool:
    return hook in vars(callback) or getattr(type(callback), hook) is not getattr(Callback, hook)


def _unknown(kind: type) -> type | None:
    """The class of Lightning's own that a callback is or is derived from, if it is none of those known."""
    package = Callback.__module__.rpartition(".")[0]  # lightning.pytorch.callbacks
    own = [c for c in kind.__mro__ if c.__module__.startswith(package) and c is not Callback]
    return next((c for c in own if not issubclass(c, KNOWN)), None)


class SameWeights(Callback):
    """The weights that a validation is of are those that are saved after it, and at the end of training.

    Comes after all callbacks of the user's, before the one that saves.
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
        """
        Raises:
            AgreedEnd: the weights are not those validated at this step.
        """
        changed = trainer.global_step == self._step and not self._norms.equal(_norms(pl_module))
        if trainer.strategy.reduce_boolean_decision(changed, all=False):
            given = [type(c).__name__ for c in trainer.callbacks if not type(c).__module__.startswith("train.")]
            raise AgreedEnd(
                f"Step {trainer.global_step}: a callback changes the trained weights for or after their validation, so "
                "its figures are not of the weights that would be saved. Leave out the callback that does; those given "
                f"are {', '.join(given)}."
            )


def _norms(module: lightning.LightningModule) -> Tensor:
    """[parameters] on the host; of this rank's pieces under ZeRO 3. NaN becomes a number that equals itself."""
    pieces = [getattr(parameter, "ds_tensor", parameter).detach() for parameter in module.trained().values()]
    return torch.stack(torch._foreach_norm(pieces)).nan_to_num(nan=-1.0).cpu()
