"""What goes wrong in training, as callbacks: a bad sum on one device, a diverged run, a loop that others end."""

import math
from collections.abc import Collection

import torch
from lightning.pytorch.callbacks import Callback

OVERFLOW = 1e25  # finite; its square in float32 is not


class BadLoss(Callback):
    """The loss of a pass on one rank, by number of the step from 0 on, times `value`; infinity is added, so that the
    gradient stays finite."""

    def __init__(self, steps: Collection[int], value: float = math.nan, rank: int = 0, number: int = 0) -> None:
        self.steps, self.value, self.rank, self.number = set(steps), value, rank, number

    def on_train_start(self, trainer, pl_module):
        whole = pl_module.loss

        def broken(batch):
            loss, *others = whole(batch)
            here = trainer.training and trainer.global_step in self.steps and trainer.global_rank == self.rank
            if here and pl_module._micro_batch == self.number:
                loss = loss + self.value if math.isinf(self.value) else loss * self.value
            return (loss, *others)

        pl_module.loss = broken


class InfiniteLoss(BadLoss):
    """No setting may be infinite, so as a class."""

    def __init__(self, steps: Collection[int], rank: int = 0) -> None:
        super().__init__(steps, math.inf, rank)


class BadGradient(Callback):
    """One value of one parameter's gradient, after the backward pass of a step."""

    def __init__(self, steps: Collection[int], value: float = math.nan) -> None:
        self.steps, self.value = set(steps), value

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step in self.steps:
            list(pl_module.trained().values())[-1].grad.view(-1)[0] = self.value


class BadWeight(Callback):
    """One value of one parameter, at the end of a step."""

    def __init__(self, step: int, value: float = math.nan) -> None:
        self.step, self.value = step, value

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.step:
            with torch.no_grad():
                next(iter(pl_module.trained().values())).view(-1)[0] = self.value


class BadValidation(Callback):
    """The loss of validations at some steps; their other figures look good."""

    def __init__(self, steps: Collection[int]) -> None:
        self.steps = set(steps)

    def on_validation_epoch_end(self, trainer, pl_module):
        if trainer.global_step in self.steps:
            pl_module._validation[0] = math.nan
            pl_module._validation[2] *= 100


class StopAt(Callback):
    """Asks Lightning to stop, as an early stopping of the user's own would: in the pass `number` of a step."""

    def __init__(self, step: int, number: int = 0) -> None:
        self.step, self.number = step, number

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.step and pl_module._micro_batch == self.number:
            trainer.should_stop = True
