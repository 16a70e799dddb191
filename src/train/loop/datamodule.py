"""Data module of one training stage: data loaders over packed rows."""

from collections.abc import Sequence

import lightning
import torch

from data.batch import Batch
from data.preprocess.packing import Row
from train.loop.batches import Ahead, FromStep, TrainingBatches, ValidationBatches


class DraftData(lightning.LightningDataModule):
    """Training and validation data loaders of one stage."""

    def __init__(
        self,
        training: Sequence[Row],
        validation: Sequence[Row],
        *,
        steps: int,
        global_batch_size: int,
        micro_batch_size: int | None = None,
        num_anchors: int,
        block_size: int,
        seed: int,
        workers: int = 0,
    ) -> None:
        """
        Args:
            workers: prefetching processes per data loader; 0: none.
        """
        super().__init__()
        self.training, self.validation = training, validation
        self.steps, self.global_batch_size, self.micro_batch_size = steps, global_batch_size, micro_batch_size
        self.num_anchors = num_anchors
        self.block_size, self.seed, self.workers = block_size, seed, workers
        self.loaders: list[Ahead] = []

    def _batches(self, rank: int, world_size: int) -> TrainingBatches:
        return TrainingBatches(
            self.training,
            steps=self.steps,
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            num_anchors=self.num_anchors,
            block_size=self.block_size,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )

    def batch_bytes(self, world_size: int) -> int:
        """Return the size of one training micro-batch in bytes."""
        values = vars(self._batches(0, world_size)[0]).values()
        return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))

    def train_dataloader(self) -> Ahead:
        trainer = self._trainer()
        batches = self._batches(trainer.global_rank, trainer.world_size)
        return self._keep(Ahead(batches, self.workers, FromStep(batches, lambda: trainer.global_step)))

    def val_dataloader(self) -> Ahead:
        trainer = self._trainer()
        world = trainer.world_size
        batches = ValidationBatches(
            self.validation,
            rows_per_batch=self.micro_batch_size or max(1, self.global_batch_size // world),
            num_anchors=self.num_anchors,
            block_size=self.block_size,
            rank=trainer.global_rank,
            world_size=world,
        )
        return self._keep(Ahead(batches, self.workers))

    def _trainer(self) -> lightning.Trainer:
        assert self.trainer is not None  # Lightning attaches it before asking for data loaders
        return self.trainer

    def _keep(self, loader: Ahead) -> Ahead:
        self.loaders.append(loader)
        return loader

    def close(self) -> None:
        """Shut down the worker processes of all data loaders."""
        for loader in self.loaders:
            loader.close()

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move a batch to the device; on CUDA asynchronously, from pinned memory."""
        return batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch.to(device)
