"""User callbacks: validation metrics belong to the final weights of a stage, otherwise the callback is refused."""

import inspect

import pytest
import torch
from helpers.runs import run
from lightning.pytorch import callbacks as lightnings
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, LambdaCallback, StochasticWeightAveraging

from data.errors import UserError
from train.endings.agreed import AgreedEnd
from train.loop.callbacks import KNOWN, SameWeights, check_callbacks


class MyAverage(EMAWeightAveraging):
    """User subclass under another name."""


class MyStopping(lightnings.EarlyStopping):
    """User subclass under another name."""


class MySaver(Callback):
    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        checkpoint["state_dict"] = {}


class Watcher(Callback):
    """Observer with its own state."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen = trainer.global_step

    def state_dict(self):
        return {"seen": self.seen}


class Swap(Callback):
    """Change the weights for validation only, or permanently."""

    def __init__(self, start: str, end: str = "") -> None:
        setattr(self, start, lambda trainer, module, *_: self.add(module, 0.5))
        if end:
            setattr(self, end, lambda trainer, module, *_: self.add(module, -0.5))

    @staticmethod
    def add(module, value):
        for parameter in module.trained().values():
            parameter.data.add_(value)  # as weight averaging does, invisible to autograd


@pytest.mark.parametrize(
    ("callback", "said"),
    [
        (lightnings.ModelCheckpoint(), "ModelCheckpoint saves checkpoints"),
        (lightnings.OnExceptionCheckpoint("x"), "keep_checkpoints"),
        (EMAWeightAveraging(), "EMAWeightAveraging changes the content of checkpoints"),
        (MyAverage(), "MyAverage changes the content of checkpoints"),
        (MySaver(), "MySaver changes the content of checkpoints"),
        (LambdaCallback(on_save_checkpoint=print), "LambdaCallback changes the content of checkpoints"),
        (StochasticWeightAveraging(1e-3), "StochasticWeightAveraging changes training"),
        (lightnings.EarlyStopping("val/loss"), "EarlyStopping would stop training.*stage.<stage>.patience"),
        (MyStopping("val/tau", mode="max"), "MyStopping would stop training.*stage.<stage>.patience"),
        (lightnings.GradientAccumulationScheduler({0: 2}), "Supported Lightning callbacks: "),
        (object(), "is not a lightning.pytorch.callbacks.Callback"),
    ],
)
def test_unsupported_callbacks_are_refused_by_name(callback, said):
    with pytest.raises(UserError, match=f"callbacks.mine: .*{said}"):
        check_callbacks({"mine": callback})


def test_observing_callbacks_are_accepted():
    check_callbacks({"mine": Watcher(), "bar": lightnings.TQDMProgressBar(), "rich": lightnings.RichProgressBar()})
    check_callbacks({"rate": lightnings.LearningRateMonitor(), "limit": lightnings.Timer({"hours": 1})})


def test_every_lightning_callback_is_supported_or_refused():
    kinds = [kind for _, kind in inspect.getmembers(lightnings, inspect.isclass) if issubclass(kind, Callback)]
    assert len(kinds) > 15
    for kind in set(kinds) - {Callback}:
        instance = object.__new__(kind)
        if issubclass(kind, KNOWN):
            check_callbacks({"given": instance})
        else:
            with pytest.raises(UserError, match="callbacks.given"):
                check_callbacks({"given": instance})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "end"),
    [
        ("on_validation_start", "on_validation_end"),
        ("on_validation_epoch_start", "on_validation_epoch_end"),
        ("on_train_end", ""),
    ],
)
def test_weights_swapped_only_for_validation_end_the_run(start, end, tmp_path):
    with pytest.raises(AgreedEnd, match="a callback changed the trained weights.*callbacks: .*Swap"):
        run(tmp_path, faults=[Swap(start, end), SameWeights()], best_by=None)


@pytest.mark.slow
def test_weights_changed_before_training_are_accepted(tmp_path):
    training, checkpointer, _ = run(tmp_path, faults=[Swap("on_train_start"), Watcher(), SameWeights()])
    assert checkpointer.best and all(torch.isfinite(p).all() for p in training.trained().values())
