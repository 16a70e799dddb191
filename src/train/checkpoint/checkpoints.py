"""Checkpoints that survive: written whole or not at all, checked before use, the last few and the best kept."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint, Timer
from lightning.pytorch.plugins.io import CheckpointIO
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.errors import UserError
from train.checkpoint.rng_state import random_state, set_random_state
from train.endings.agreed import AgreedEnd, Diverged, NotFinished
from train.endings.finite import COUNTED, check_state, way_out
from train.endings.preemption import agreed_signal, set_training, stop
from train.run_dir.checkpoint_names import DIGEST, NAMED, checkpoints_in, step_of
from train.run_dir.state import file_sha256, publish
from train.terminal import say


class CheckpointFiles(CheckpointIO):
    """One file per checkpoint, `step-00000050-<sha256>.ckpt`: its name says what it must hold."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Path, storage_options: Any | None = None) -> None:
        """`path` is the name without the digest."""
        needed = _bytes_of(checkpoint)
        _publish(Path(path), lambda temporary: torch.save(checkpoint, temporary), needed)

    def load_checkpoint(self, path: Path, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Tensors and plain values alone, on the host: a file from elsewhere cannot run code."""
        return torch.load(path, map_location="cpu", weights_only=True)

    def remove_checkpoint(self, path: Path) -> None:
        Path(path).unlink(missing_ok=True)


def keeper(trainer: lightning.Trainer) -> "Checkpoints":
    """The callback below, among whatever else a user has added."""
    return next(callback for callback in trainer.callbacks if isinstance(callback, Checkpoints))


def usable_checkpoint(directory: Path, say: Callable[[str], None] = print, run: str | None = None) -> Path | None:
    """The newest checkpoint that is whole, and whose best weights are; None if there is none.

    From an older one, training makes again what was damaged. Where no checkpoint knows whole best weights, the newest
    whole one has to do: the best is then that of the validations to come. Every rank finds the same.

    Args:
        say: gets a line for each file that is passed over, with its name.
        run: the id of the stage's run (`run_state.run_id`). Checkpoints of other runs are passed over; those of earlier
            versions hold no id and are taken.
    """
    found = checkpoints_in(directory)
    whole = []
    for path in found:
        if not whole_file(path):
            say(f"{path}: damaged, its content is not what its name says.")
            continue
        callbacks = torch.load(path, mmap=True, map_location="cpu", weights_only=True).get("callbacks", {})
        state = callbacks.get("Checkpoints", {})
        if run and state.get("run") not in (None, run):
            say(f"{path}: of another run of this stage ({state['run']}, this one is {run}); not used.")
            continue
        whole.append(path)
        best = state.get("best", {})
        if not best or whole_file(directory / best["file"]):
            return path
        say(f"{directory / best['file']}: damaged or gone, though {path.name} refers to it.")
    if whole:
        say(f"{directory}: no best weights are left; those of the validations to come will count.")
    elif found:
        say(f"{directory}: no checkpoint can be used; beginning anew.")
    return whole[0] if whole else None


class Checkpoints(Checkpoint):
    """Saves the state at boundaries of a step, where nothing of it is pending, and stops there when asked to.

    At a step that validates, the boundary comes after the validation: saved before it, a resumed run would leave that
    validation out, and might choose other weights in the end.
    """

    def __init__(
        self,
        directory: Path,
        *,
        every: int,
        keep: int,
        validate_every: int,
        best_by: str | None,
        patience: int | None = None,
        run: str | None = None,
    ) -> None:
        """
        Args:
            every: steps between checkpoints.
            keep: how many of the last ones stay.
            validate_every: steps between validations; one comes at the last step, too.
            best_by: figure of the validation that says which weights are best; the greatest wins, the first of equals.
            patience: after so many validations in a row that were none the best, the stage ends; None: never.
            run: the id of the stage's run, which every checkpoint carries.
        """
        self.directory, self.every, self.keep = directory, every, keep
        self.validate_every, self.best_by, self.patience = validate_every, best_by, patience
        self.run = run
        self.resumed_from: Path | None = None
        self.best: dict[str, Any] = {}  # step, value and file of the best weights, and the validation's figures
        self.waited = 0  # validations since the best
        self.last: dict[str, float] = {}  # figures of the last validation
        self.best_of: dict[int, int] = {}  # step of a kept checkpoint -> step of the best weights that it knows
        self._random: dict[str, Any] | None = None
        self._saved = 0  # step of the newest checkpoint
        self.started_at = 0  # step at which this process began

    def state_dict(self) -> dict[str, Any]:
        known = {"best": self.best, "last": self.last, "best_of": self.best_of, "waited": self.waited}
        known["run"] = self.run
        return known | {"random": random_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.last, self.best_of = (state_dict[key] for key in ("best", "last", "best_of"))
        self.waited = state_dict.get("waited", 0)  # older checkpoints knew no patience
        if self.best and not whole_file(self.directory / self.best["file"]):
            self.best, self.waited = {}, 0  # `usable_checkpoint` has said so
        self._random = state_dict["random"]

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Lightning counts passes; the passes of a step may be others now, with other ranks or `micro_batch_size`.

        A time limit (`trainer.max_time`) holds for each start of the run: with the time of earlier ones, the next would
        end before its first step.
        """
        for timer in (callback for callback in trainer.callbacks if isinstance(callback, Timer)):
            checkpoint["callbacks"].pop(timer.state_key, None)
        self._saved = self.started_at = checkpoint["global_step"]
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        passes = checkpoint["global_step"] * trainer.accumulate_grad_batches
        for counts in (progress["total"], progress["current"]):
            moved = passes - counts["ready"]
            counts.update({key: value + moved for key, value in counts.items()})

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """
        Raises:
            UserError: the ranks do not see the same files.
        """
        chosen = [self.resumed_from and self.resumed_from.name]
        if trainer.world_size > 1:
            chosen = [None] * trainer.world_size
            dist.all_gather_object(chosen, self.resumed_from and self.resumed_from.name)
        if len(set(chosen)) > 1:
            raise UserError(f"{self.directory}: the ranks found different checkpoints there: {chosen}. Try again.")

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._random is not None:
            set_random_state(self._random)
        if self.out_of_patience():
            trainer.should_stop = True  # it was before: the run was killed before that was on record
        set_training(True)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # in the middle of a step
        if trainer.global_step == trainer.max_steps:
            trainer.should_stop = True  # Lightning validates before it does, whatever the step
        if not self._validates(trainer):
            self._boundary(trainer)

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """
        Raises:
            Diverged: a weight or a moment of the optimizer is not finite.
        """
        check_state(trainer, checkpoint["state_dict"], self.directory, "trained weights")
        states = [state["state"] for state in checkpoint["optimizer_states"]]
        moments = {
            f"{name} {key}": value for state in states for key, of in state.items() for name, value in of.items()
        }
        moments = {name: value for name, value in moments.items() if isinstance(value, Tensor)}
        check_state(trainer, moments, self.directory, "optimizer's moments")

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        metrics = trainer.callback_metrics  # the same on every rank
        self.last = {key: float(value) for key, value in metrics.items() if key.startswith("val/")}
        if not (self._validates(trainer) and trainer.lightning_module.ends_step):
            return  # Lightning validates whenever it is asked to stop; a resumed run would not
        bad = [key for key in COUNTED if not math.isfinite(self.last.get(key, 0.0))]
        if bad:
            say(f"    step {trainer.global_step}: {', '.join(bad)} not finite; these weights cannot be the best")
        elif self.best_by and self.best_by not in self.last:
            say(
                f"    step {trainer.global_step}: warning: {self.best_by} was not measured, as no block of the "
                "validation has a label; these weights cannot be the best"
            )
        self._judge(trainer, comparable=not bad)
        if self.out_of_patience():
            trainer.should_stop = True
        self._boundary(trainer)

    def faults(self) -> list[str]:
        """Names of the figures of the handed-on weights that are not finite."""
        return [key for key in COUNTED if not math.isfinite(self.figures().get(key, 0.0))]

    def _judge(self, trainer: lightning.Trainer, comparable: bool) -> None:
        """Whether the weights just validated are the best so far. `comparable`: all their figures are finite."""
        value = self.last.get(self.best_by)
        better = comparable and value is not None and (not self.best or value > self.best["value"])
        self.waited = 0 if better else self.waited + 1
        if better:
            here = {"step": trainer.global_step, "value": value, "figures": self.last}
            self.best = here | {"file": self._save_weights(trainer)}

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Where the loop was ended between two boundaries: in the middle of a step, say."""
        self._end_early(trainer)

    def out_of_patience(self) -> bool:
        """Whether the stage ends before its last step: the same on every rank, as the figures are."""
        return self.patience is not None and self.waited >= self.patience

    def best_weights(self) -> dict[str, Tensor]:
        """The trained parameters of the best validation, by exported name; nothing if there was none."""
        return load_file(self.directory / self.best["file"]) if self.best else {}

    def figures(self) -> dict[str, float]:
        """The validation of the weights that the stage hands on: the best, or the last."""
        return self.best["figures"] if self.best else self.last

    def _validates(self, trainer: lightning.Trainer) -> bool:
        due = trainer.global_step % self.validate_every == 0 or trainer.global_step == trainer.max_steps
        return due and any(trainer.num_val_batches)

    def _boundary(self, trainer: lightning.Trainer) -> None:
        step, signal = trainer.global_step, agreed_signal(trainer.strategy)
        due = step % self.every == 0 and not trainer.lightning_module.step.fault  # what was before skipped steps stays
        if due or trainer.should_stop or signal:
            self._save(trainer)
        if signal:
            trainer.strategy.barrier()  # no rank leaves before the file is there
            stop(signal)
        self._end_early(trainer)

    def _end_early(self, trainer: lightning.Trainer) -> None:
        """
        Raises:
            AgreedEnd: something other than the last step, or this stage's own patience, has ended the loop.
        """
        stopping = trainer.strategy.reduce_boolean_decision(trainer.should_stop, all=False)
        if not stopping or trainer.global_step >= trainer.max_steps or self.out_of_patience():
            return
        if self._saved != trainer.global_step:
            self._save(trainer)
        trainer.strategy.barrier()
        raise not_finished(trainer, self.directory)

    def _save(self, trainer: lightning.Trainer) -> None:
        step = self._saved = trainer.global_step
        self.best_of[step] = self.best.get("step", 0)
        self.best_of = dict(sorted(self.best_of.items())[-self.keep :])
        # Not the weights alone: the whole state. It is plain values and tensors; `load_checkpoint` takes no others.
        trainer.save_checkpoint(self.directory / f"step-{step:08d}.ckpt", weights_only=False)
        if trainer.is_global_zero:
            self._forget_old(step)

    def _save_weights(self, trainer: lightning.Trainer) -> str | None:
        """The trained parameters as they are; returns the file's name, on the first rank."""
        state = trainer.strategy.lightning_module_state_dict()  # on every rank: under ZeRO 3 each has a piece
        check_state(trainer, state, self.directory, "validated weights")
        if not trainer.is_global_zero:
            return None
        weights = {name: tensor.cpu() for name, tensor in state.items()}
        name = self.directory / f"best-{trainer.global_step:08d}.safetensors"
        return _publish(name, lambda temporary: save_file(weights, temporary), _bytes_of(weights)).name

    def _forget_old(self, step: int) -> None:
        """Remove what no kept checkpoint needs, and what an interrupted run has left; never what is ahead of it."""
        for path in checkpoints_in(self.directory):
            if step_of(path) < step and step_of(path) not in self.best_of:
                path.unlink()
        for path in self.directory.glob(".*.tmp"):
            path.unlink()
        for path in self.directory.glob("best-*.safetensors"):
            if NAMED.fullmatch(path.stem) and step_of(path) < min(self.best_of.values()):
                path.unlink()


def check_handed_on(trainer: lightning.Trainer, trained: dict[str, Tensor]) -> None:
    """What a stage hands on is finite: the best weights were checked when they were saved; the last ones are here.

    Args:
        trained: the parameters after the last step.

    Raises:
        Diverged: weights, or the figures of their validation, are not finite.
    """
    kept = keeper(trainer)
    if not kept.best:
        check_state(trainer, trained, kept.directory, "trained weights")
    if faults := kept.faults():
        raise Diverged(
            f"Step {trainer.global_step}: {', '.join(faults)} of the weights to be handed on are not finite. "
            f"{way_out(kept.directory)}"
        )


def not_finished(trainer: lightning.Trainer, directory: Path) -> AgreedEnd:
    """The end of a run whose loop was ended by something other than the stage itself.

    A run that has made no step since its start must not be started again: it would end in the same place.
    """
    stage = directory.parent.name
    timed = any(isinstance(c, Timer) for c in trainer.callbacks)
    limit = "trainer.max_time" if timed else "a callback"
    text = f"{stage} ended at step {trainer.global_step} of {trainer.max_steps}, by {limit}: it is not finished. "
    early = f"To end a stage early for good, use stage.{stage}.patience or fewer stage.{stage}.steps."
    if trainer.global_step > keeper(trainer).started_at:
        return NotFinished(f"{text}The same command goes on from here, without overwrite if it has that. {early}")
    way = "Give it more time than one step takes" if timed else "Leave out the callback that sets trainer.should_stop"
    return AgreedEnd(
        f"{text}No step was made since the start, so the same command would end here again. {way}. {early}"
    )


def _publish(path: Path, write: Callable[[Path], Any], needed: int) -> Path:
    """Write to `path` with the digest of the content in its name; returns that name."""
    named = lambda written: path.with_stem(f"{path.stem}-{file_sha256(written)[:DIGEST]}")  # noqa: E731
    return publish(path, write, named, needed=needed)


def _bytes_of(value: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(value, Tensor):
        return value.nbytes
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(_bytes_of, parts))


def whole_file(path: Path) -> bool:
    """Whether a file with its digest in its name is still what it was."""
    return path.exists() and file_sha256(path).startswith(path.stem.rpartition("-")[2])
