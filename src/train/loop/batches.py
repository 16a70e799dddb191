"""Batches as a pure function of (seed, step), so data loading has no state to checkpoint."""

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch.utils.data import DataLoader, Dataset, Sampler

from data.batch import IGNORE, Batch
from data.preprocess.anchors import make_batch
from data.preprocess.packing import Row
from train.settings.derived import micro_batches_per_step

VALIDATION = 1  # keeps validation seeds distinct from training seeds (0)


@dataclass(frozen=True)
class BatchSettings:
    """Settings that, together with the rows, determine a stage's batches."""

    steps: int
    global_batch_size: int  # rows per step across all ranks
    num_anchors: int  # blocks per row
    block_size: int
    seed: int
    micro_batch_size: int | None = None  # rows per micro-batch on each rank; None: one micro-batch per step

    @classmethod
    def of_stage(cls, config: DictConfig, stage: str) -> "BatchSettings":
        """Read a training stage's batch settings from the config."""
        settings = config.stage[stage]
        return cls(
            steps=settings.steps,
            global_batch_size=settings.global_batch_size,
            num_anchors=settings.num_anchors,
            block_size=config.model.draft.block_size,
            seed=config.seed,
            micro_batch_size=settings.micro_batch_size,
        )


class TrainingBatches(Dataset[Batch]):
    """One rank's shard of every global batch, with one item per micro-batch.

    Rows are reshuffled every epoch, and anchors are resampled each time a row is used. The global batch at a given step
    does not depend on the number of ranks or micro-batches.
    """

    def __init__(self, rows: Sequence[Row], settings: BatchSettings, *, rank: int = 0, world_size: int = 1) -> None:
        """
        Raises:
            ValueError: `global_batch_size` does not divide evenly into ranks and micro-batches.
        """
        self.micro_batches = micro_batches_per_step(settings.global_batch_size, settings.micro_batch_size, world_size)
        self.rows, self.settings, self.rank, self.world_size = rows, settings, rank, world_size

    def __len__(self) -> int:
        return self.settings.steps * self.micro_batches

    def __getitem__(self, index: int) -> Batch:
        return self.batch(*divmod(index, self.micro_batches))

    def batch(self, step: int, number: int = 0) -> Batch:
        """Return this rank's micro-batch `number` for step `step`."""
        settings = self.settings
        size = settings.global_batch_size // (self.world_size * self.micro_batches)
        first = (self.rank * self.micro_batches + number) * size
        places = range(first, first + size)
        chosen = [self.rows[self._row_at(step * settings.global_batch_size + place)] for place in places]
        seeds: list[tuple[int, ...]] = [(settings.seed, 0, step, place) for place in places]
        return make_batch(chosen, num_anchors=settings.num_anchors, block_size=settings.block_size, seeds=seeds)

    def _row_at(self, drawn: int) -> int:
        """Return the index of the row at position `drawn` in the infinite sequence of shuffled epochs."""
        epoch, place = divmod(drawn, len(self.rows))
        if getattr(self, "_epoch", None) != epoch:
            generator = np.random.default_rng((self.settings.seed, epoch))
            self._epoch, self._order = epoch, generator.permutation(len(self.rows))
        return int(self._order[place])


class StepSampler(Sampler[int]):
    """Yields the indices of all remaining micro-batches in order, starting at the current step.

    `current_step` is called when iteration starts, not at construction.
    """

    def __init__(self, batches: TrainingBatches, current_step: Callable[[], int]) -> None:
        self.batches, self.current_step = batches, current_step

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.current_step() * self.batches.micro_batches, len(self.batches)))


class ValidationBatches(Dataset[Batch]):
    """Validation batches, sharded across ranks. Every validation uses the same rows and anchors.

    All ranks get the same number of batches and rows, because under ZeRO 3 a rank that finishes early would block the
    others. The last ranks are padded with repeated rows whose labels are ignored.
    """

    def __init__(self, rows: Sequence[Row], settings: BatchSettings, *, rank: int = 0, world_size: int = 1) -> None:
        self.rows, self.settings = rows, settings
        self.rows_per_batch = settings.micro_batch_size or max(1, settings.global_batch_size // world_size)
        per_rank = -(-len(rows) // world_size)
        self.mine = range(rank * per_rank, (rank + 1) * per_rank)

    def __len__(self) -> int:
        return -(-len(self.mine) // self.rows_per_batch)

    def __getitem__(self, index: int) -> Batch:
        places = self.mine[index * self.rows_per_batch : (index + 1) * self.rows_per_batch]
        if not places:
            raise IndexError(index)
        rows = [self.rows[i % len(self.rows)] for i in places]
        seeds: list[tuple[int, ...]] = [(0, VALIDATION, i) for i in places]
        settings = self.settings
        batch = make_batch(rows, num_anchors=settings.num_anchors, block_size=settings.block_size, seeds=seeds)
        again = torch.tensor([i >= len(self.rows) for i in places])
        return replace(batch, labels=batch.labels.masked_fill(again[:, None, None], IGNORE), lengths=())


class BatchLoader(DataLoader):
    """DataLoader for datasets whose items are complete batches. `workers=0` builds batches in the main process."""

    def __init__(self, batches: Dataset[Batch], workers: int, sampler: Sampler[int] | None = None) -> None:
        super().__init__(
            batches, batch_size=None, sampler=sampler, num_workers=workers, worker_init_fn=_leave_signals_to_the_run
        )
        self._begun: list[Any] = []

    def __iter__(self) -> Any:
        self._begun = [iterator for iterator in self._begun if not getattr(iterator, "_shutdown", True)]
        self._begun.append(super().__iter__())
        return self._begun[-1]

    def close(self) -> None:
        """Shut down the workers, including any kept alive by the traceback of an exception that aborted the loop.

        Otherwise the interpreter would wait for them at exit, and they ignore signals.
        """
        for iterator in self._begun:
            if hasattr(iterator, "_shutdown_workers"):
                iterator._shutdown_workers()
        self._begun = []


def _leave_signals_to_the_run(worker: int) -> None:
    """Ignore signals in a data loader worker.

    A signal sent to the entire job would otherwise kill the worker before the run saves a checkpoint.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
