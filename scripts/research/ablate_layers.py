"""The paper's ablation: whole draft layers are trained, FFN and norms included, in place of their attention alone.

    python scripts/research/ablate_layers.py +experiment=tiny name=whole_0 seed=0

A run like any other, with all stages and settings; only the drafter differs. Its decoding is sequential: parallel mode
runs the FFN of candidates and slots together, which here are two. The artifact can be read by this script alone.
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
    """A drafter whose layers are copies of the target's, and trained as a whole."""

    def __init__(self, target, **settings) -> None:
        super().__init__(target, **settings)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for layer in target.model.layers[self.split_layer :])
        self.layers.to(self.mask_embedding.dtype).requires_grad_(True)
        for layer in self.layers:
            layer.self_attn.is_causal = False  # slots of a block see each other in both directions

    def attention_parameters(self) -> dict[str, nn.Parameter]:
        """What stage 1 trains: here, all of the layers."""
        return {"mask_embedding": self.mask_embedding, **dict(self.layers.named_parameters(prefix="layers"))}


if __name__ == "__main__":
    for module in (models.export.artifact_io, train.stages):
        module.DraftModel = WholeLayers
    for module in (train.evaluate.acceptance, train.loop.validation_decoding):
        module.generate = partial(generate, mode="sequential")
    sys.argv.append("stage.evaluate.speed.num_prompts=0")  # it would be measured in parallel mode, too
    watch()
    quiet()
    check_overrides(sys.argv[1:])
    main()
