"""Checkpoint callback that saves at step boundaries and keeps the latest checkpoints and the best weights."""

import math
from pathlib import Path
from typing import Any

import lightning
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint, Timer
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.errors import UserError
from train.checkpoint.files import bytes_of, is_intact, publish_named
from train.checkpoint.rng_state import random_state, set_random_state
from train.endings.agreed import AgreedEnd, Diverged, NotFinished
from train.endings.finite import COUNTED, advice, callbacks_of, check_state, latest_step
from train.endings.preemption import agreed_signal, set_training, stop
from train.run_dir.checkpoint_names import NAMED, checkpoints_in, step_of
from train.terminal import say


def checkpointer(trainer: lightning.Trainer) -> "Checkpoints":
    """Return the trainer's `Checkpoints` callback."""
    return next(callback for callback in callbacks_of(trainer) if isinstance(callback, Checkpoints))


class Checkpoints(Checkpoint):
    """Saves checkpoints and handles stop requests, both only at step boundaries.

    If a step is followed by validation, its boundary comes after the validation. If the checkpoint were saved earlier,
    a resumed run would skip that validation and might select different best weights.
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
            keep: number of most recent checkpoints to keep.
            validate_every: steps between validations; the last step is always validated.
            best_by: validation metric that selects the best weights; higher is better, and the earliest wins ties.
            patience: number of consecutive validations without improvement after which the stage ends; None: no limit.
            run: id of the stage's run, stored in every checkpoint.
        """
        self.directory, self.every, self.keep = directory, every, keep
        self.validate_every, self.best_by, self.patience = validate_every, best_by, patience
        self.run = run
        self.resumed_from: Path | None = None
        self.best: dict[str, Any] = {}  # step, metric value, file and validation metrics of the best weights
        self.waited = 0  # number of validations since the best weights
        self.last: dict[str, float] = {}  # metrics of the latest validation
        self.best_of: dict[int, int] = {}  # step of a kept checkpoint -> step of its best weights
        self._random: dict[str, Any] | None = None
        self._saved = 0  # step of the newest checkpoint
        self.started_at = 0  # step from which this process started training

    def state_dict(self) -> dict[str, Any]:
        known = {"best": self.best, "last": self.last, "best_of": self.best_of, "waited": self.waited}
        known["run"] = self.run
        return known | {"random": random_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.last, self.best_of = (state_dict[key] for key in ("best", "last", "best_of"))
        self.waited = state_dict.get("waited", 0)  # missing in checkpoints from earlier versions
        if self.best and not is_intact(self.directory / self.best["file"]):
            self.best, self.waited = {}, 0  # `usable_checkpoint` has already reported the damage
        self._random = state_dict["random"]

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adjust Lightning's counters to the current number of micro-batches per step, and reset timers.

        Lightning counts micro-batches, and the number of ranks or `micro_batch_size` may have changed. A time limit
        (`trainer.max_time`) applies to each start of the run separately. If it were cumulative, a resumed run would
        stop before its first step.
        """
        for timer in (callback for callback in callbacks_of(trainer) if isinstance(callback, Timer)):
            checkpoint["callbacks"].pop(timer.state_key, None)
        self._saved = self.started_at = checkpoint["global_step"]
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        micro_batches = checkpoint["global_step"] * trainer.accumulate_grad_batches
        for counts in (progress["total"], progress["current"]):
            moved = micro_batches - counts["ready"]
            counts.update({key: value + moved for key, value in counts.items()})

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Check that all ranks resume from the same checkpoint.

        Raises:
            UserError: the ranks found different checkpoints.
        """
        chosen = [self.resumed_from and self.resumed_from.name]
        if trainer.world_size > 1:
            chosen = [None] * trainer.world_size
            dist.all_gather_object(chosen, self.resumed_from and self.resumed_from.name)
        if len(set(chosen)) > 1:
            raise UserError(f"{self.directory}: the ranks found different checkpoints: {chosen}. Rerun the command.")

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._random is not None:
            set_random_state(self._random)
        if self.out_of_patience():
            trainer.should_stop = True  # patience ran out before the run was killed
        set_training(True)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # in the middle of a step
        if trainer.global_step == trainer.max_steps:
            trainer.should_stop = True  # Lightning then validates before stopping, even between validations
        if not self._validates(trainer):
            self._boundary(trainer)

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Check that the state to be saved is finite.

        Raises:
            Diverged: a weight or an optimizer moment is not finite.
        """
        check_state(trainer, checkpoint["state_dict"], self.directory, "trained weights")
        states = [state["state"] for state in checkpoint["optimizer_states"]]
        moments = {
            f"{name} {key}": value for state in states for key, of in state.items() for name, value in of.items()
        }
        moments = {name: value for name, value in moments.items() if isinstance(value, Tensor)}
        check_state(trainer, moments, self.directory, "optimizer moments")

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        metrics = trainer.callback_metrics  # the same on every rank
        self.last = {key: float(value) for key, value in metrics.items() if key.startswith("val/")}
        if not (self._validates(trainer) and trainer.lightning_module.ends_step):
            return  # extra validation triggered by a stop request; a resumed run would not repeat it
        bad = [key for key in COUNTED if not math.isfinite(self.last.get(key, 0.0))]
        if bad:
            say(
                f"    step {trainer.global_step}: warning: non-finite {', '.join(bad)}; these weights cannot become "
                "the best"
            )
        elif self.best_by and self.best_by not in self.last:
            say(
                f"    step {trainer.global_step}: warning: {self.best_by} was not measured because no validation block "
                "has a label; these weights cannot become the best"
            )
        self._judge(trainer, comparable=not bad)
        if self.out_of_patience():
            trainer.should_stop = True
        self._boundary(trainer)

    def faults(self) -> list[str]:
        """Return the names of the non-finite validation metrics of the weights that the stage outputs."""
        return [key for key in COUNTED if not math.isfinite(self.figures().get(key, 0.0))]

    def _judge(self, trainer: lightning.Trainer, comparable: bool) -> None:
        """Update the best weights if the validated weights are the best so far.

        Args:
            comparable: whether all validation metrics are finite.
        """
        value = self.last.get(self.best_by) if self.best_by else None
        better = comparable and value is not None and (not self.best or value > self.best["value"])
        self.waited = 0 if better else self.waited + 1
        if better:
            here = {"step": trainer.global_step, "value": value, "figures": self.last}
            self.best = here | {"file": self._save_weights(trainer)}

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Handle a loop that was stopped between two step boundaries, e.g. in the middle of a step."""
        self._end_early(trainer)

    def out_of_patience(self) -> bool:
        """Return whether `patience` has run out. All ranks agree, because they have the same metrics."""
        return self.patience is not None and self.waited >= self.patience

    def best_weights(self) -> dict[str, Tensor]:
        """Load the best weights, keyed by exported name. Return an empty dict if no validation has selected any."""
        return load_file(self.directory / self.best["file"]) if self.best else {}

    def figures(self) -> dict[str, float]:
        """Return the validation metrics of the weights that the stage outputs: the best weights, or else the last."""
        return self.best["figures"] if self.best else self.last

    def _validates(self, trainer: lightning.Trainer) -> bool:
        due = trainer.global_step % self.validate_every == 0 or trainer.global_step == trainer.max_steps
        return due and any(trainer.num_val_batches)

    def _boundary(self, trainer: lightning.Trainer) -> None:
        step, signal = trainer.global_step, agreed_signal(trainer.strategy)
        # A skipped step must not replace the last good checkpoint.
        due = step % self.every == 0 and not latest_step(trainer.lightning_module).fault
        if due or trainer.should_stop or signal:
            self._save(trainer)
        if signal:
            trainer.strategy.barrier()  # no rank exits before the file is written
            stop(signal)
        self._end_early(trainer)

    def _end_early(self, trainer: lightning.Trainer) -> None:
        """Save a checkpoint and raise if the loop is being stopped early.

        Raises:
            AgreedEnd: the loop is stopped by anything other than the last step or `patience`.
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
        # Save the full training state, not just the weights: plain values and tensors, as `load_checkpoint` requires.
        trainer.save_checkpoint(self.directory / f"step-{step:08d}.ckpt", weights_only=False)
        if trainer.is_global_zero:
            self._forget_old(step)

    def _save_weights(self, trainer: lightning.Trainer) -> str | None:
        """Save the current trained parameters and return the file name on rank 0, None on the others."""
        state = trainer.strategy.lightning_module_state_dict()  # on every rank: ZeRO 3 shards the parameters
        check_state(trainer, state, self.directory, "validated weights")
        if not trainer.is_global_zero:
            return None
        weights = {name: tensor.cpu() for name, tensor in state.items()}
        name = self.directory / f"best-{trainer.global_step:08d}.safetensors"
        return publish_named(name, lambda temporary: save_file(weights, temporary), bytes_of(weights)).name

    def _forget_old(self, step: int) -> None:
        """Delete files that no kept checkpoint needs, and leftovers from interrupted runs. Keep later checkpoints."""
        for path in checkpoints_in(self.directory):
            if step_of(path) < step and step_of(path) not in self.best_of:
                path.unlink()
        for path in self.directory.glob(".*.tmp"):
            path.unlink()
        for path in self.directory.glob("best-*.safetensors"):
            if NAMED.fullmatch(path.stem) and step_of(path) < min(self.best_of.values()):
                path.unlink()


def check_final_weights(trainer: lightning.Trainer, trained: dict[str, Tensor]) -> None:
    """Check that the weights that a stage outputs and their validation metrics are finite.

    The best weights were already checked when they were saved. If there are none, the last weights are checked here.

    Args:
        trained: the parameters after the last step.

    Raises:
        Diverged: a weight or a validation metric is not finite.
    """
    checkpoints = checkpointer(trainer)
    if not checkpoints.best:
        check_state(trainer, trained, checkpoints.directory, "trained weights")
    if faults := checkpoints.faults():
        raise Diverged(
            f"Step {trainer.global_step}: the final weights have non-finite validation metrics: {', '.join(faults)}. "
            f"{advice(checkpoints.directory)}"
        )


def not_finished(trainer: lightning.Trainer, directory: Path) -> AgreedEnd:
    """Return the error for a loop that a time limit or a callback stopped before the last step.

    `NotFinished` asks for a restart. If this process has completed no step, return a plain `AgreedEnd` instead, because
    a restart would stop at the same step.
    """
    stage = directory.parent.name
    timed = any(isinstance(c, Timer) for c in callbacks_of(trainer))
    limit = "trainer.max_time" if timed else "a callback"
    text = f"{stage} is not finished: stopped at step {trainer.global_step} of {trainer.max_steps} because of {limit}. "
    early = f"To finish a stage early, set stage.{stage}.patience or decrease stage.{stage}.steps."
    if trainer.global_step > checkpointer(trainer).started_at:
        return NotFinished(f"{text}Rerun the command to resume, without overwrite if it was set. {early}")
    way = "Allow more time than one step takes" if timed else "Remove the callback that sets trainer.should_stop"
    return AgreedEnd(
        f"{text}No step was completed after startup, so the same command would stop here again. {way}. {early}"
    )
