"""The fingerprint distinguishes a drafter's target from its relatives, and recognizes the same model in other forms."""

import time
import warnings
from copy import deepcopy

import pytest
import torch
from helpers.shared import ARCHITECTURE, TINY, random_target
from torch import nn
from torch.nn.functional import linear

from models.export.fingerprint import compare, fingerprint
from models.target import load_target


class Rounded(nn.Module):
    """Linear layer in quantized form: integers and scales, no `weight`."""

    def __init__(self, module: nn.Linear, bits: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = module.in_features, module.out_features, module.bias
        scale = module.weight.detach().abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        self.register_buffer("packed", (module.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x):
        return linear(x, self.packed.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def replaced(target, make):
    """Replace the linear layers within the model's layers."""
    target = deepcopy(target)
    for layer in target.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, module in list(parent.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(parent, name, make(module))
    return target


def changed(target, amount: float, names: str = ""):
    """Add noise to the model's matrices, relative to their scale."""
    target = deepcopy(target)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if parameter.dim() > 1 and names in name:
                parameter.add_(amount * parameter.std() * torch.randn_like(parameter))
    return target


def dynamic(target):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(target, {nn.Linear}, dtype=torch.qint8)


FORMS = {
    "itself": lambda target: target,
    "bfloat16": lambda target: deepcopy(target).bfloat16(),
    "float16": lambda target: deepcopy(target).half(),
    "float64": lambda target: deepcopy(target).double(),
    "8 bits": lambda target: replaced(target, lambda module: Rounded(module, 8)),
    "4 bits": lambda target: replaced(target, lambda module: Rounded(module, 4)),
    "4 bits in bfloat16": lambda target: replaced(target.bfloat16(), lambda module: Rounded(module, 4)),
    "dynamic int8": dynamic,
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_same_model_in_another_form_is_the_same(form, bias):
    target = random_target(attention_bias=bias)
    if bias:
        with torch.no_grad():
            for layer in target.model.layers:
                layer.self_attn.q_proj.bias.normal_().mul_(100)  # as in Qwen2
    found = compare(fingerprint(target), FORMS[form](deepcopy(target)))
    assert found.compared > 40 and found.changed == () and found.warning() is None


def test_rows_of_padding_do_not_count():
    target = random_target()
    stored = fingerprint(target)
    target.resize_token_embeddings(128)
    assert compare(stored, target).changed == ()


def adapted(target, effect: bool):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=not effect)
    return get_peft_model(target, lora).eval()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_effective_adapter_is_detected_merged_or_not(dtype):
    stored = fingerprint(random_target(dtype))
    assert compare(stored, adapted(random_target(dtype), False).get_base_model()).changed == ()
    whole = adapted(random_target(dtype), True).get_base_model()
    merged = adapted(random_target(dtype), True).merge_and_unload()
    for target in (whole, merged):
        found = compare(stored, target)
        assert found.changed and all(name.endswith(("q_proj", "v_proj")) for name in found.changed)
        assert "fine-tuned variant" in found.warning()
    assert compare(fingerprint(merged), whole).changed == ()


@pytest.mark.parametrize("names", ["", "q_proj", "layers.4.", "mlp", "embed_tokens", "lm_head"])
@pytest.mark.parametrize("amount", [0.02, 0.2])
def test_a_fine_tuned_relative_is_detected_wherever_it_differs(names, amount):
    target = random_target()
    found = compare(fingerprint(target), changed(target, amount, names))
    assert found.changed and amount / 2 < found.distance < 2 * amount and "fine-tuned" in found.warning()


def test_a_different_norm_is_detected():
    target = random_target()
    stored = fingerprint(target)
    with torch.no_grad():
        target.model.layers[2].input_layernorm.weight.mul_(1.05)
    assert compare(stored, target).changed == ("layers.2.input_layernorm",)


def test_other_weights_are_distinguished_from_relatives():
    assert "unrelated weights" in compare(fingerprint(random_target()), random_target(seed=9)).warning()
    quantized = replaced(random_target(seed=9), lambda module: Rounded(module, 4))
    assert "unrelated weights" in compare(fingerprint(random_target()), quantized).warning()


def test_it_is_small_and_cheap_for_many_layers():
    target = load_target(None, architecture=ARCHITECTURE | {"num_hidden_layers": 80})
    start = time.perf_counter()
    stored = fingerprint(target)
    assert time.perf_counter() - start < 1
    assert len(stored) < 150 and len(str(stored)) < 30_000


def test_the_embedded_target_is_stored_in_bfloat16_and_trained_in_float32():
    stored = fingerprint(load_target(str(TINY / "target"), dtype="float32"))
    assert compare(stored, load_target(str(TINY / "target"), dtype="bfloat16")).changed == ()


@pytest.mark.parametrize("stored", [[], "text", {"norm": 3}, {"norm": "one"}, {"norm": None}])
def test_an_invalid_fingerprint_is_rejected(stored):
    with pytest.raises(ValueError, match="target_fingerprint is not a fingerprint"):
        compare(stored, random_target())
