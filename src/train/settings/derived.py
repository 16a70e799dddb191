"""Values derived from the trainer preset and a stage's settings. Torch is imported only to detect devices."""

from typing import Any

from omegaconf import DictConfig, ListConfig

from data.errors import UserError

ARITHMETIC = {"32-true": "float32", "bf16-mixed": "bfloat16"}
PRECISIONS = {None: "32-true", 32: "32-true", "32": "32-true", "bf16": "bf16-mixed"}  # Lightning's short names
ALL = -1  # the value of `trainer.devices` that selects all devices


def precision(config: DictConfig) -> Any:
    """Return `trainer.precision`, with short names replaced by Lightning's full names."""
    given = config.trainer.get("precision")
    return PRECISIONS.get(given, given) if isinstance(given, str | int | None) else given


def arithmetic(config: DictConfig) -> str:
    """Return the compute dtype for matrix products."""
    return ARITHMETIC[precision(config)]


def accelerator(config: DictConfig) -> str:
    """Return the device type for training, export and evaluation (cpu, cuda or mps), resolved as Lightning does."""
    chosen = config.trainer.get("accelerator", "auto") or "auto"
    if chosen not in ("auto", "gpu"):
        return str(chosen)
    from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator  # deferred: imports torch

    if MPSAccelerator.is_available():
        return "mps"
    return "cuda" if chosen == "gpu" or CUDAAccelerator.is_available() else "cpu"


def devices(config: DictConfig) -> int | list[int]:
    """Parse `trainer.devices`, in any form that Lightning accepts, into a count, `ALL`, or a list of device indices.

    Raises:
        UserError: the value has none of these forms.
    """
    given = config.trainer.get("devices", "auto")
    expected = UserError(f"trainer.devices={given}: expected a count, -1 or auto for all, or a list, e.g. [0,1].")
    found = ALL if given in (None, "auto") else given
    try:
        if isinstance(found, str):
            found = [int(one) for one in found.split(",") if one.strip()] if "," in found else int(found)
    except ValueError:
        raise expected from None
    if isinstance(found, ListConfig | list):
        found = list(found)
        if not found or any(type(one) is not int or one < 0 for one in found) or len(set(found)) < len(found):
            raise expected
    elif type(found) is not int or found < ALL or found == 0:
        raise expected
    return found


def device_count(config: DictConfig, available: int) -> int:
    """Return the number of devices per node that the trainer uses.

    Args:
        config: the composed settings.
        available: number of devices on the node; `trainer.devices=-1` uses all of them.

    Raises:
        UserError: as for `devices`.
    """
    chosen = devices(config)
    return len(chosen) if isinstance(chosen, list) else available if chosen == ALL else chosen


def device(config: DictConfig) -> str:
    """Return the device of rank 0, which exports and evaluates, e.g. `cpu`, `cuda` or `cuda:1`."""
    kind, chosen = accelerator(config), devices(config)
    return f"{kind}:{chosen[0]}" if isinstance(chosen, list) and kind == "cuda" else kind


def check_device(config: DictConfig) -> None:
    """Check that this machine has the configured devices.

    Raises:
        UserError: a device is missing.
    """
    kind, chosen = accelerator(config), devices(config)
    if kind == "cpu":
        return
    from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator

    there = {"cuda": CUDAAccelerator, "mps": MPSAccelerator}[kind].auto_device_count()
    if not there:
        asked = config.trainer.get("accelerator")
        raise UserError(f"trainer.accelerator={asked}: no such GPU found on this machine. Use trainer=cpu.")
    if isinstance(chosen, list) and max(chosen) >= there:
        raise UserError(f"trainer.devices={config.trainer.devices}: GPU indices on this machine end at {there - 1}.")


def micro_batches_per_step(global_batch_size: int, micro_batch_size: int | None, world_size: int) -> int:
    """Return the number of gradient accumulation steps per rank; 1 if `micro_batch_size` is None.

    Raises:
        ValueError: the number of ranks does not divide the global batch size, or the micro-batch size does not divide
            the rows per rank.
    """
    if global_batch_size % world_size:
        raise ValueError(
            f"global_batch_size={global_batch_size}: must be a multiple of {world_size}, the number of ranks."
        )
    per_rank = global_batch_size // world_size
    if micro_batch_size and per_rank % micro_batch_size:
        raise ValueError(
            f"micro_batch_size={micro_batch_size}: must evenly divide the {per_rank} rows per rank "
            f"(global_batch_size={global_batch_size}, world size {world_size})."
        )
    return per_rank // (micro_batch_size or per_rank)
