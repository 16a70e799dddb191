"""Memory layout of the weights on CPUs."""

import torch
from torch import nn
from transformers import PreTrainedModel


@torch.no_grad()
def store_by_columns(target: PreTrainedModel) -> None:
    """Store the weights of the layers' projections column by column, if they are float32 on a CPU.

    Products with a few rows, as in a decoding step, then run a fifth faster (docs/results/regeneration_speed.md), since
    the BLAS library need not transpose the weights each time. Values, names and shapes stay the same.
    """
    for module in target.model.layers.modules():
        if type(module) is nn.Linear and module.weight.device.type == "cpu" and module.weight.dtype == torch.float32:
            module.weight.data = module.weight.t().contiguous().t()
