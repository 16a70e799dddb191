"""Parameters computed from sizes against those of transformers' modules, for each family."""

import pytest
import torch
from helpers.shared import ROOT
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM

from models.cost.sizes import FAMILIES, Sizes
from models.draft import DraftModel
from models.draft_config import DraftConfig
from models.families import TESTED, layer_windows

SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "head_dim": 8}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DRAFT = {"num_layers": 3, "block_size": 6, "calibrator_rank": 8}
KINDS = ["sliding_attention", "full_attention"]
CASES = [
    ("qwen3", {}),
    ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    ("qwen2", {}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}),
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("mistral", {"sliding_window": 64}),
    ("mistral", {"sliding_window": None}),
    ("qwen3_moe", EXPERTS),
    ("qwen3_moe", EXPERTS | {"decoder_sparse_step": 2, "mlp_only_layers": [3]}),
    ("gemma3_text", {"sliding_window": 64, "layer_types": [*KINDS, *KINDS, KINDS[0]]}),
    ("phi3", {"sliding_window": 64, "pad_token_id": 0}),
    ("olmo2", {}),
    ("olmo2", {"attention_bias": True}),
]


def on_meta(config):
    """Build a model on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family, special", CASES)
def test_parameters_and_windows_are_those_of_the_real_modules(family, special):
    config = AutoConfig.for_model(family, **SMALL | special)
    model, sizes = on_meta(config), Sizes.from_config(config.to_dict(), **DRAFT)
    assert sizes.target_parameters == sum(p.numel() for p in model.parameters())
    attention = [sum(p.numel() for p in layer.self_attn.parameters()) for layer in model.model.layers]
    assert attention == [sizes.attention_parameters] * sizes.layers
    ffn = [sum(p.numel() for p in layer.mlp.parameters()) for layer in model.model.layers]
    assert ffn == [sizes.ffn_parameters(n) for n in sizes.all_layers]
    assert list(sizes.windows) == layer_windows(config)


@pytest.mark.parametrize("bonus_slot", [False, True])
@pytest.mark.parametrize("chain_rank", [0, 5])
@pytest.mark.parametrize("calibrator_rank", [0, 8])
def test_parameters_are_those_of_the_real_drafter(calibrator_rank, chain_rank, bonus_slot):
    config = AutoConfig.for_model("qwen3", **SMALL)
    shape = DRAFT | {"calibrator_rank": calibrator_rank, "chain_rank": chain_rank, "bonus_slot": bonus_slot}
    draft = DraftModel(AutoModelForCausalLM.from_config(config), DraftConfig(**shape))
    frozen, joint = (Sizes.from_config(config.to_dict(), **shape, joint=joint) for joint in (False, True))
    tuned, calibrator, own = (
        sum(p.numel() for p in group().values())
        for group in (draft.attention_parameters, draft.calibrator_parameters, draft.own_parameters)
    )
    first, second = "attention_tuning", "bonus_calibration"
    for sizes in (frozen, joint):
        assert [sizes.trained_parameters(first), sizes.held_parameters(first)] == [tuned, tuned]
        assert [sizes.draft_parameters(first), sizes.draft_parameters(second)] == [tuned, own]
        assert sizes.held_parameters(second) == own
    assert (frozen.trained_parameters(second), joint.trained_parameters(second)) == (calibrator, own)


def test_every_tested_family_is_counted():
    assert set(FAMILIES) == set(TESTED) == {family for family, _ in CASES}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, billions, active",
    [
        ("qwen3_1_7b", 1.72, 1.72),
        ("qwen3_4b", 4.02, 4.02),
        ("qwen3_8b", 8.19, 8.19),
        ("qwen3_14b", 14.77, 14.77),
        ("qwen3_32b", 32.76, 32.76),
        ("qwen3_30b_a3b", 30.53, 3.35),
        ("llama3_1_8b", 8.03, 8.03),
    ],
)
def test_the_published_models_have_the_published_sizes(name, billions, active):
    settings = OmegaConf.load(ROOT / "conf" / "model" / f"{name}.yaml")
    architecture = OmegaConf.to_container(settings.target.architecture)
    sizes = Sizes.from_config(architecture, **settings.draft)
    config = AutoConfig.for_model(**architecture)
    assert sizes == Sizes.from_config(config.to_dict(), **settings.draft)
    assert {key: config.to_dict()[key] for key in architecture} == architecture  # the values that a run compares
    assert sizes.target_parameters == sum(p.numel() for p in on_meta(config).parameters())
    assert sizes.target_parameters / 1e9 == pytest.approx(billions, abs=0.005)
    unused = sum(sizes.ffn_parameters(n) - sizes.ffn_weights(n) for n in sizes.all_layers)
    assert (sizes.target_parameters - unused) / 1e9 == pytest.approx(active, abs=0.005)


def test_the_names_of_a_published_config_are_understood():
    """Keys of config.json that transformers 5 renamed, and optional keys."""
    published = SMALL | EXPERTS | {"model_type": "qwen3_moe"}
    assert Sizes.from_config(published, **DRAFT).sparse == (True,) * 5
    off = {"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": False}
    assert Sizes.from_config(SMALL | off, **DRAFT).windows == (None,) * 5
    assert Sizes.from_config(SMALL | {"model_type": "gemma3_text"}, **DRAFT).tied


@pytest.mark.parametrize("kind", ["mamba", None])
def test_an_unsupported_family_is_named(kind):
    with pytest.raises(ValueError, match=rf"model_type={kind!r} is not counted; these are: gemma3_text, .*qwen3_moe"):
        Sizes.from_config(SMALL | {"model_type": kind}, **DRAFT)


def test_a_missing_size_is_named():
    config = {"model_type": "llama"} | SMALL
    del config["vocab_size"]
    with pytest.raises(ValueError, match="no vocab_size"):
        Sizes.from_config(config, **DRAFT)
