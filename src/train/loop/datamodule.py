"""Lightning data module for a training stage, with data loaders over packed rows."""

from collections.abc import Sequence

import lightning
import torch

from data.batch import Batch
from data.preprocess.packing import Row
from train.loop.batches import BatchLoader, BatchSettings, StepSampler, TrainingBatches, ValidationBatches


class DraftData(lightning.LightningDataModule):
    """Training and validation data loaders for one stage."""

    def __init__(
        self, training: Sequence[Row], validation: Sequence[Row], settings: BatchSettings, *, workers: int = 0
    ) -> None:
        """
        Args:
            workers: worker processes per data loader; 0 loads in the main process.
        """
        super().__init__()
        self.training, self.validation, self.settings, self.workers = training, validation, settings, workers
        self.loaders: list[BatchLoader] = []

    def batch_bytes(self, world_size: int) -> int:
        """Return the size of one training micro-batch in bytes."""
        batches = TrainingBatches(self.training, self.settings, world_size=world_size)
        values = vars(batches[0]).values()
        return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))

    def train_dataloader(self) -> BatchLoader:
        batches = TrainingBatches(self.training, self.settings, **self._place())
        trainer = self._trainer()
        return self._keep(BatchLoader(batches, self.workers, StepSampler(batches, lambda: trainer.global_step)))

    def val_dataloader(self) -> BatchLoader:
        return self._keep(BatchLoader(ValidationBatches(self.validation, self.settings, **self._place()), self.workers))

    def _place(self) -> dict[str, int]:
        """Return this process's rank and the world size."""
        trainer = self._trainer()
        return {"rank": trainer.global_rank, "world_size": trainer.world_size}

    def _trainer(self) -> lightning.Trainer:
        assert self.trainer is not None  # Lightning attaches it before requesting data loaders
        return self.trainer

    def _keep(self, loader: BatchLoader) -> BatchLoader:
        self.loaders.append(loader)
        return loader

    def close(self) -> None:
        """Shut down the worker processes of all data loaders."""
        for loader in self.loaders:
            loader.close()

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move a batch to the device. Copies to CUDA are asynchronous, from pinned memory."""
        return batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch.to(device)
