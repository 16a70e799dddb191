"""Quantized and adapted targets of the same shape."""

import pytest
import torch
from check_families import random_pair
from helpers.shared import random_draft
from torch import nn
from transformers import (
    AutoModelForCausalLM,
)

from models.custom_generate import generate as shipped
from models.export.artifact_io import export_draft

IDS = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(0))


MASK = torch.ones_like(IDS)


CALL = {"attention_mask": MASK, "max_new_tokens": 20, "do_sample": False, "eos_token_id": 96, "pad_token_id": 0}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    target, _ = random_pair("qwen3")
    target.save_pretrained(root / "target")
    export_draft(random_draft(target, bonus_slot=True, chain_rank=4), root / "drafter", torch.float32)
    return root


@pytest.fixture
def twin(root):
    return AutoModelForCausalLM.from_pretrained(root / "target", dtype="auto")


def drafted(twin, drafter, **arguments):
    return shipped.generate(twin, inputs=IDS, drafter=str(drafter), **CALL | arguments)


def own(twin, **arguments):
    return twin.generate(IDS, **CALL | arguments)


class Packed(nn.Module):
    """A linear layer as in GPTQ and 4-bit quantization: two weights per byte, no parameter of the usual shape."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.abs().max() / 7
        levels = ((linear.weight / scale).round().clamp(-8, 7) + 8).to(torch.uint8)
        self.register_buffer("qweight", levels[:, ::2] * 16 + levels[:, 1::2])
        self.register_buffer("scales", scale)

    def forward(self, hidden):
        levels = torch.stack([self.qweight // 16, self.qweight % 16], dim=-1).flatten(1)
        return hidden @ ((levels.to(hidden.dtype) - 8) * self.scales).T


def packed(model):
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, Packed(child))
    return model


def adapted(*modules, merge=False):
    def adapt(model):
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=list(modules), init_lora_weights=False))
        return wrapped.merge_and_unload() if merge else wrapped.base_model.model

    return adapt
