"""Parameters and FLOPs of the published models and of every tested family, counted without data."""

import pytest
import torch
from check_families import FAMILIES, random_pair
from helpers.flops import flop_counter, without_data
from helpers.shared import ROOT
from helpers.training import SETTINGS
from omegaconf import OmegaConf
from transformers import AutoConfig

from models.attention.layers import Execution
from models.cost.flops import DecodingFlops
from models.cost.trace import Trace, full_batch, meta_target
from models.draft import DraftModel
from models.draft_config import DraftConfig
from models.target import target_pass
from train.loop.modules import AttentionTuning


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tested_family_is_counted(family):
    """Without attention, whose windows the counter of torch does not know."""
    target, draft = random_pair(family)
    batch = full_batch(2, 16, 1, draft.block_size)
    traced = without_data(AttentionTuning, target.config, draft.config, **SETTINGS | {"execution": Execution("dense")})
    assert sum(p.numel() for p in traced.target.parameters()) == sum(p.numel() for p in target.parameters())
    trace = Trace()
    with trace, torch.no_grad():
        target_pass(traced.target, batch.to(torch.device("meta")), target.config.num_hidden_layers, execution=DENSE)
    with flop_counter() as counter, torch.no_grad():
        target_pass(target, batch, target.config.num_hidden_layers)
    linear = {op: n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op)}
    assert trace.flops["target pass"] == sum(linear.values())


DENSE = Execution("dense")


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
    config = AutoConfig.for_model(**architecture)
    assert {key: config.to_dict()[key] for key in architecture} == architecture  # what a run compares them with
    target = meta_target(config, torch.float32)
    parameters = sum(p.numel() for p in target.parameters())
    assert parameters / 1e9 == pytest.approx(billions, abs=0.005)
    with torch.device("meta"):
        draft = DraftModel(target, DraftConfig(num_layers=1, block_size=2, calibrator_rank=0))
    # Two FLOPs per weight of the layers and token.
    weights = sum(p.numel() for p in target.model.layers.parameters() if p.ndim > 1)
    unused = weights - DecodingFlops.of(draft).token / 2
    assert (parameters - unused) / 1e9 == pytest.approx(active, abs=0.005)


def test_the_names_of_a_published_config_are_understood():
    """A config.json names the experts otherwise than transformers 5."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    published = meta_target(AutoConfig.for_model("qwen3_moe", **sizes, num_experts=6), torch.float32)
    renamed = meta_target(AutoConfig.for_model("qwen3_moe", **sizes, num_local_experts=6), torch.float32)
    assert {n: p.shape for n, p in published.named_parameters()} == {n: p.shape for n, p in renamed.named_parameters()}
