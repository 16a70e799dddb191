"""Rows to the loaders of one training stage."""

from collections.abc import Sequence

import lightning

from data.packing import Row
from train.batches import TrainingBatches, ValidationBatches


class DraftData(lightning.LightningDataModule):
    """The loaders of one training stage."""

    def __init__(
        self,
        training: Sequence[Row],
        validation: Sequence[Row],
        *,
        steps: int,
        rows_per_step: int,
        rows_per_pass: int | None = None,
        num_anchors: int,
        block_size: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.training, self.validation = training, validation
        self.steps, self.rows_per_step, self.rows_per_pass = steps, rows_per_step, rows_per_pass
        self.num_anchors = num_anchors
        self.block_size, self.seed = block_size, seed

    def train_dataloader(self) -> TrainingBatches:
        return TrainingBatches(
            self.training,
            steps=self.steps,
            rows_per_step=self.rows_per_step,
            rows_per_pass=self.rows_per_pass,
            num_anchors=self.num_anchors,
            block_size=self.block_size,
            seed=self.seed,
            current_step=lambda: self.trainer.global_step,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )

    def val_dataloader(self) -> ValidationBatches:
        world = self.trainer.world_size
        return ValidationBatches(
            self.validation,
            rows_per_batch=self.rows_per_pass or max(1, self.rows_per_step // world),
            num_anchors=self.num_anchors,
            block_size=self.block_size,
            rank=self.trainer.global_rank,
            world_size=world,
        )
