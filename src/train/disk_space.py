"""Checks that stage outputs fit on disk (using the estimates of `plan=true`) and that batches fit in shared memory."""

import os
from pathlib import Path

from omegaconf import DictConfig

from data.errors import UserError
from train.context import Resources
from train.names import TRAINED
from train.plan.estimate import disk_parts
from train.run_dir.disk import check_access, check_no_link, free_bytes, size, used_bytes

ADAPTER = "adapter"  # run subdirectory for the PEFT adapter that stage 1 trains with adapter=lora
# Maps each stage to the run subdirectories that it replaces with its result when it finishes.
REPLACED = {"attention_tuning": (ADAPTER, f"{ADAPTER}.new"), "export": ("export", "export.new")}


def check_disk(config: DictConfig, resources: Resources, run_dir: Path, stages: list[str]) -> None:
    """Check that the run directory is writable and has room for the output of the given stages.

    Args:
        stages: the stages still to run.

    Raises:
        UserError: the run directory is not writable, or the output of these stages does not fit.
        DiskError: a directory that these stages replace is a symbolic link.
    """
    check_no_link(*(run_dir / name for stage in stages for name in REPLACED.get(stage, ())))
    places = [run_dir / stage / part for stage in stages for part in (".", "checkpoints")]
    places += [run_dir / name for stage in stages for name in REPLACED.get(stage, ())]
    check_access(run_dir, run_dir / "records", *(place for place in places if place.is_dir()))
    try:
        parts = disk_parts(config, resources.target_config, stages)
    except UserError:
        return  # invalid settings are reported by another check
    parts = {name: count for name, count in parts.items() if count}
    needed, free = sum(parts.values()), free_bytes(run_dir)
    held = used_bytes(*(run_dir / stage for stage in stages))  # earlier output of these stages is replaced
    if free is not None and needed > free + held:
        detail = ", ".join(f"{name} {size(count)}" for name, count in parts.items())
        fewer = " decrease stage.<stage>.keep_checkpoints," if any(s in TRAINED for s in stages) else ""
        raise UserError(
            f"{run_dir}: {size(free)} free, but stages {', '.join(stages)} require an additional {size(needed - held)} "
            f"(in total: {detail}). Free up disk space,{fewer} or set run_dir=... to a path on a different disk, then "
            "rerun the command."
        )


def check_shared_memory(workers: int, batch: int, place: Path = Path("/dev/shm")) -> None:
    """Check that shared memory has room for the batches that data loader workers pass through it.

    Args:
        workers: number of worker processes in each of the two data loaders.
        batch: size of one batch in bytes; each worker prefetches two batches.

    Raises:
        UserError: the batches do not fit.
    """
    if not workers or not os.access(place, os.F_OK):
        return
    needed, free = 2 * workers * (2 * batch + 2**14), free_bytes(place)
    if free is not None and free < needed:
        raise UserError(
            f"runtime.workers={workers}: the workers' batches need {size(needed)}, but {place} has only {size(free)} "
            f"free. Enlarge {place} (docker run --shm-size=1g; mount -o remount,size=1g {place}), or set "
            "runtime.workers=0."
        )
