"""FLOPs and parameters of real modules."""

from contextlib import nullcontext

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from models.cost.trace import meta_target
from models.draft import DraftModel
from models.draft_config import DraftConfig
from models.lora import LoraDraft
from train.loop.modules import DraftTraining

ATEN = torch.ops.aten


# PyTorch has no FLOP formula for grouped expert products or for its CPU attention kernels.
WITHOUT_FORMULA = {
    ATEN._grouped_mm: lambda tokens, weights, *_, **__: 2 * tokens[0] * tokens[1] * weights[2],
    ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(
        g, q, k, v
    ),
}


def without_data(stage: type[DraftTraining], target_config, draft_config: DraftConfig, lora=None, **settings):
    """A training stage with a target of this config on the meta device."""
    target = meta_target(target_config, torch.float32)
    with torch.device("meta"):
        draft = LoraDraft(target, lora, draft_config) if lora else DraftModel(target, draft_config)
        return stage(target, draft, **settings)


def flop_counter() -> FlopCounterMode:
    counter = FlopCounterMode(display=False, custom_mapping=WITHOUT_FORMULA)
    # FLOPs per module are not needed, and the hooks that track modules fail on a gradient within a forward pass.
    counter.mod_tracker = nullcontext()
    counter.mod_tracker.parents = {"Global"}
    return counter
