"""Save and restore the random state of all ranks as tensors and plain values."""

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


def random_state() -> dict[str, Any]:
    """Return the generator states of all ranks, in rank order. Must be called on every rank."""
    numpy_state: Any = np.random.get_state()  # a tuple, because legacy=True is the default
    name, keys, *rest = numpy_state
    mine: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        mine["cuda"] = torch.cuda.get_rng_state()
    if not _connected():
        return {"ranks": [mine]}
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    return {"ranks": ranks}


def set_random_state(state: dict[str, Any]) -> None:
    """Restore this rank's generators. If the number of ranks has changed, leave them in their seeded state."""
    ranks = state["ranks"]
    rank, world = (dist.get_rank(), dist.get_world_size()) if _connected() else (0, 1)
    if len(ranks) != world:
        return
    mine = ranks[rank]
    random.setstate(mine["python"])
    name, keys, *rest = mine["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(mine["torch"])
    if "cuda" in mine and torch.cuda.is_available():
        torch.cuda.set_rng_state(mine["cuda"])


def _connected() -> bool:
    return dist.is_available() and dist.is_initialized()
