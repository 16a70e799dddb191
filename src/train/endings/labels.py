"""Monitors the fraction of training blocks that have a label. Blocks without one do not contribute to the loss.

Bonus Calibration (stage 2) learns only from blocks whose first token equals the target's own prediction. Such blocks
are rare if the answers were written by a person or a different model, and there may be none if the answers are in a
different language or format.
"""

from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from train.endings.agreed import AgreedEnd
from train.endings.finite import latest_step
from train.terminal import say

LOOK = 20  # steps after which the fraction is checked; shorter stages are checked at their end
LOW = 0.25  # fraction of labeled blocks below which a warning is printed
FIX = (
    "Regenerate the answers with the target (python -m data.regenerate, with the same experiment) and train on the "
    "output (data.path=...) under a new name=... (docs/guide/data.md)."
)


class LabelledBlocks(Callback):
    """Counts blocks and labeled blocks across all ranks since the stage's first step; warns if few are labeled."""

    def __init__(self, *, needed: bool = True) -> None:
        """
        Args:
            needed: whether to raise an error if a stage has no labels. False for a target with random weights, which is
                used only to try out a command.
        """
        self.needed = needed
        self.steps = 0
        self.blocks = self.labelled = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "blocks": self.blocks, "labelled": self.labelled}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps, self.blocks, self.labelled = (state_dict[key] for key in ("steps", "blocks", "labelled"))

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the counts and check the fraction of labeled blocks when due.

        Raises:
            AgreedEnd: no block had a label in any step so far.
        """
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # in the middle of a step
        self.steps += 1
        step = latest_step(pl_module)
        self.blocks += step.blocks
        self.labelled += step.labelled
        if self.steps < LOOK and trainer.global_step < trainer.max_steps:
            return
        if not self.labelled and self.needed:
            raise AgreedEnd(
                f"Step {trainer.global_step}: none of the {self.blocks:,.0f} blocks in {self.steps} steps had a label, "
                f"so no weights were trained. {_why(pl_module)} {FIX}"
            )
        fraction = self.labelled / max(1.0, self.blocks)
        if fraction < LOW and (self.steps == LOOK or trainer.global_step == trainer.max_steps):
            say(
                f"    step {trainer.global_step}: warning: only {fraction:.1%} of the blocks have a label; the others "
                f"do not contribute to the loss. {_why(pl_module)} {FIX}"
            )


def _why(module: lightning.LightningModule) -> str:
    if not module.masks_labels:
        return "The rows contain too few assistant tokens."
    return "A block has a label only if the target predicts its first token, so these answers are not the target's own."
