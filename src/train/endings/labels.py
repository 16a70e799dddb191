"""How many of the blocks of training have a label: the others teach nothing.

Bonus Calibration (stage 2) learns from the blocks whose first token the target itself would have written. Of
conversations that another model or a person has answered these are few, of another language or format none.
"""

from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from train.endings.agreed import AgreedEnd
from train.terminal import say

LOOK = 20  # steps after which the share is judged; a stage of fewer steps is judged at its end
LOW = 0.25  # share of labelled blocks below which a warning is printed
WAY_OUT = (
    "Let the target write the answers (python -m data.regenerate, with the same experiment) and train on them, with "
    "data.path=<its output> under another name=... (docs/guide/data.md)."
)


class LabelledBlocks(Callback):
    """Counts the blocks, and those with a label, over all ranks and since the first step of the stage."""

    def __init__(self, *, needed: bool = True) -> None:
        """
        Args:
            needed: whether a stage without any label is an error. Not with a target of random weights, which tries out
                a command.
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
        """
        Raises:
            AgreedEnd: no block of any step had a label.
        """
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # in the middle of a step
        self.steps += 1
        self.blocks += pl_module.step.blocks
        self.labelled += pl_module.step.labelled
        if self.steps < LOOK and trainer.global_step < trainer.max_steps:
            return
        if not self.labelled and self.needed:
            raise AgreedEnd(
                f"Step {trainer.global_step}: none of the {self.blocks:,.0f} blocks of {self.steps} steps had a label, "
                f"so nothing was learned. {_why(pl_module)} {WAY_OUT}"
            )
        share = self.labelled / max(1.0, self.blocks)
        if share < LOW and (self.steps == LOOK or trainer.global_step == trainer.max_steps):
            say(
                f"    step {trainer.global_step}: warning: {share:.1%} of the blocks have a label; the others teach "
                f"nothing. {_why(pl_module)} {WAY_OUT}"
            )


def _why(module: lightning.LightningModule) -> str:
    if not module.masks_labels:
        return "The rows hold too little that the assistant wrote."
    return "A block has one where the target's own next token is that of the text: the answers are not the target's."
