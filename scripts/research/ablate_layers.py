"""Run the paper's ablation: train full draft layers, including FFN and norms, instead of only their attention.

    python scripts/research/ablate_layers.py +experiment=tiny name=whole_0 seed=0

All stages and settings work as in a regular run; only the drafter differs. Decoding is sequential because parallel mode
runs a single FFN over candidates and slots, whereas this drafter has its own FFN. Only this script can load the
exported drafter.
"""

import copy
import sys
from functools import partial

from torch import nn

import models.export.artifact_io
import train.evaluate.acceptance
import train.loop.validation_decoding
import train.stages
from models.decoding.flex import generate
from models.draft import DraftModel
from train.__main__ import check_overrides, main, quiet, watch


class WholeLayers(DraftModel):
    """A drafter with copies of the target's layers, all parameters of which are trained."""

    def __init__(self, target, **settings) -> None:
        super().__init__(target, **settings)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for layer in target.model.layers[self.split_layer :])
        self.layers.to(self.mask_embedding.dtype).requires_grad_(True)
        for layer in self.layers:
            layer.self_attn.is_causal = False  # slots of a block attend to each other in both directions

    def attention_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters trained in stage 1: here, the full layers."""
        return {"mask_embedding": self.mask_embedding, **dict(self.layers.named_parameters(prefix="layers"))}


if __name__ == "__main__":
    for module in (models.export.artifact_io, train.stages):
        module.DraftModel = WholeLayers
    for module in (train.evaluate.acceptance, train.loop.validation_decoding):
        module.generate = partial(generate, mode="sequential")
    sys.argv.append("stage.evaluate.speed.num_prompts=0")  # the speed test would also use parallel mode
    watch()
    quiet()
    check_overrides(sys.argv[1:])
    main()
