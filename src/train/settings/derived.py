"""What a trainer preset and a stage's settings mean together. Needs no torch, except for what a machine has."""

from typing import Any

from omegaconf import DictConfig, ListConfig

from data.errors import UserError

ARITHMETIC = {"32-true": "float32", "bf16-mixed": "bfloat16"}
PRECISIONS = {None: "32-true", 32: "32-true", "32": "32-true", "bf16": "bf16-mixed"}  # Lightning's shorter names
ALL = -1  # devices


def precision(config: DictConfig) -> Any:
    """`trainer.precision` by Lightning's whole name."""
    given = config.trainer.get("precision")
    return PRECISIONS.get(given, given) if isinstance(given, str | int | None) else given


def arithmetic(config: DictConfig) -> str:
    """The dtype that matrix products are computed in."""
    return ARITHMETIC[precision(config)]


def accelerator(config: DictConfig) -> str:
    """The kind of device that training, export and evaluation compute on: cpu, cuda or mps, as Lightning chooses it."""
    chosen = config.trainer.get("accelerator", "auto") or "auto"
    if chosen not in ("auto", "gpu"):
        return str(chosen)
    from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator  # late: they load torch

    if MPSAccelerator.is_available():
        return "mps"
    return "cuda" if chosen == "gpu" or CUDAAccelerator.is_available() else "cpu"


def devices(config: DictConfig) -> int | list[int]:
    """`trainer.devices` in any of Lightning's forms: how many, `ALL`, or the numbers of those that are meant.

    Raises:
        UserError: it is none of them.
    """
    given = config.trainer.get("devices", "auto")
    expected = UserError(f"trainer.devices={given}: expected a number, -1 or auto for all, or a list such as [0,1].")
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
    """How many devices of a node the trainer takes of those that are there.

    Raises:
        UserError: as for `devices`.
    """
    chosen = devices(config)
    return len(chosen) if isinstance(chosen, list) else available if chosen == ALL else chosen


def device(config: DictConfig) -> str:
    """The device of the first rank, which exports and evaluates: `cpu`, `cuda`, `cuda:1`."""
    kind, chosen = accelerator(config), devices(config)
    return f"{kind}:{chosen[0]}" if isinstance(chosen, list) and kind == "cuda" else kind


def check_device(config: DictConfig) -> None:
    """
    Raises:
        UserError: this machine has no such device.
    """
    kind, chosen = accelerator(config), devices(config)
    if kind == "cpu":
        return
    from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator

    there = {"cuda": CUDAAccelerator, "mps": MPSAccelerator}[kind].auto_device_count()
    if not there:
        asked = config.trainer.get("accelerator")
        raise UserError(f"trainer.accelerator={asked}: no such GPU is found here. Choose trainer=cpu.")
    if isinstance(chosen, list) and max(chosen) >= there:
        raise UserError(f"trainer.devices={config.trainer.devices}: this machine has {there}, counted from 0.")


def micro_batches_per_step(global_batch_size: int, micro_batch_size: int | None, world_size: int) -> int:
    """Gradient accumulation steps of a rank; one if `micro_batch_size` is None.

    Raises:
        ValueError: ranks or micro-batches cannot share the rows evenly.
    """
    if global_batch_size % world_size:
        raise ValueError(
            f"global_batch_size={global_batch_size} is not divisible by {world_size} ranks; choose a multiple."
        )
    share = global_batch_size // world_size
    if micro_batch_size and share % micro_batch_size:
        raise ValueError(
            f"micro_batch_size={micro_batch_size} does not divide the {share} rows of a rank "
            f"(global_batch_size={global_batch_size} on {world_size}); choose a divisor."
        )
    return share // (micro_batch_size or share)
