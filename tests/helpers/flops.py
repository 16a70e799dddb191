"""FLOPs and parameters of real modules."""

from contextlib import nullcontext

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from models.cost.sizes import Sizes

ATEN = torch.ops.aten


# PyTorch has no FLOP formula for grouped expert products or for its CPU attention kernels.
WITHOUT_FORMULA = {
    ATEN._grouped_mm: lambda tokens, weights, *_, **__: 2 * tokens[0] * tokens[1] * weights[2],
    ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(
        g, q, k, v
    ),
}


def sizes_of(target, **draft) -> Sizes:
    shape = {"num_layers": 3, "block_size": 6, "calibrator_rank": 8} | draft
    return Sizes.from_config(target.config.to_dict(), **shape)


def flop_counter() -> FlopCounterMode:
    counter = FlopCounterMode(display=False, custom_mapping=WITHOUT_FORMULA)
    # FLOPs per module are not needed, and the hooks that track modules fail on a gradient within a forward pass.
    counter.mod_tracker = nullcontext()
    counter.mod_tracker.parents = {"Global"}
    return counter
