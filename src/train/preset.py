"""What a trainer preset and a stage's settings mean together. Needs no torch: the plan reads them, too."""

from omegaconf import DictConfig


def arithmetic(config: DictConfig) -> str:
    """The dtype that matrix products are computed in."""
    return {"32-true": "float32", "bf16-mixed": "bfloat16"}[config.trainer.precision]


def device(config: DictConfig) -> str:
    """The kind of device that the stages compute on."""
    return "cuda" if config.trainer.accelerator in ("gpu", "cuda") else "cpu"


def passes_per_step(rows_per_step: int, rows_per_pass: int | None, world_size: int) -> int:
    """How many passes a rank's share of a step takes; None: all of it in one.

    Raises:
        ValueError: ranks or passes cannot share the rows evenly.
    """
    if rows_per_step % world_size:
        raise ValueError(f"rows_per_step={rows_per_step} is not divisible by {world_size} ranks; choose a multiple.")
    share = rows_per_step // world_size
    if rows_per_pass and share % rows_per_pass:
        raise ValueError(
            f"rows_per_pass={rows_per_pass} does not divide the {share} rows of a rank (rows_per_step={rows_per_step} "
            f"on {world_size}); choose a divisor."
        )
    return share // (rows_per_pass or share)
