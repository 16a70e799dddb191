"""The state of all random generators, of every rank, as plain values that a checkpoint can hold."""

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


def random_state() -> dict[str, Any]:
    """The generators' states of all ranks, in their order. Called on every rank."""
    name, keys, *rest = np.random.get_state()
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
    """Put this rank's generators back. With another number of ranks there is nothing to put back: they stay seeded."""
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
