"""Every setting is listed by name, either as part of a stage's identity or as without effect on the outcome."""

import json
from dataclasses import asdict

import pytest
import torch
from helpers.configs import composed
from omegaconf import OmegaConf

from data.config import compose
from models.draft_config import DraftConfig
from train.context import Resources
from train.names import STAGES
from train.resume.identity import CHANGES, WITHOUT_EFFECT, counts, differences, rule
from train.run_dir.state import read_record

# Groups with user-defined keys or keys of another command.
FREE = ("benchmarks", "logger", "hydra", "regenerate", "hardware", "data.template_kwargs", "data.path")
FREE += ("model.target.architecture", "trainer.strategy", "adapter", "objective")
CHOICES = [[], ["adapter=lora"], ["model=stand_in"], ["+recipe=beyond"], ["trainer=zero3"], ["objective=mixture"]]


def leaves(tree, path=""):
    if not isinstance(tree, dict) or not tree or path in FREE:
        return [path]
    return [leaf for key, value in tree.items() for leaf in leaves(value, f"{path}.{key}" if path else key)]


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_every_setting_is_classified_by_its_own_name(choice):
    config = OmegaConf.to_container(composed("+experiment=tiny", *choice), resolve=False)
    named = CHANGES.keys() | WITHOUT_EFFECT.keys()
    groups = ("stage.attention_tuning.module.objective", "stage.bonus_calibration.module.objective")
    groups += ("callbacks.progress", *FREE)
    for setting in leaves(config):
        known = setting in named or setting.startswith(groups) and rule(setting) is not None
        assert known, f"{setting}: say in train.resume.identity which stages' outcome it changes, or why none"


def test_a_target_with_random_weights_depends_on_the_seed_alone():
    config = compose.composed(["+experiment=tiny", "model=stand_in"])
    weights = []
    for config.seed in (3, 3, 4):
        torch.rand(5)  # a resumed run may draw other numbers before it builds the target
        state = torch.get_rng_state()
        weights.append(Resources(config).target.model.layers[0].self_attn.q_proj.weight)
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_no_setting_is_listed_twice_or_outdated():
    assert not CHANGES.keys() & WITHOUT_EFFECT.keys()
    there = leaves(OmegaConf.to_container(composed("+experiment=tiny", "adapter=lora"), resolve=False))
    gone = [
        name
        for name in CHANGES.keys() | WITHOUT_EFFECT.keys()
        if not any(f"{t}.".startswith(f"{name}.") for t in there)
    ]
    lightnings = [name for name in gone if name.startswith("trainer.")]  # users may add these
    assert set(gone) - set(lightnings) == {"hydra", "stage.attention_tuning.module.joint"}


@pytest.mark.parametrize("stage", STAGES[:2])
def test_settings_that_save_memory_are_not_part_of_the_identity(stage):
    old = {
        "stage": {"module": {"chunk": 1}, "decode": {"batch_size": 1}, "micro_batch_size": 1},
        "inputs": {"target": {}},
    }
    new = {
        "stage": {"module": {"chunk": 2}, "decode": {"batch_size": 2}, "micro_batch_size": 2},
        "inputs": {"target": {}},
    }
    assert differences(old, new, stage) == []
    new["stage"]["decode"]["prompts"] = 4
    assert differences(old, new, stage) == ["stage.decode.prompts: None -> 4"]


def test_an_unclassified_setting_is_part_of_the_identity():
    assert counts("stage.brand_new", "export") and counts("trainer.limit_val_batches", "attention_tuning")
    assert not counts("stage.batch_size", "evaluate") and counts("stage.num_prompts", "evaluate")


def test_a_record_of_an_earlier_version_is_compared_by_its_entries():
    sha, other = "a" * 64, "b" * 64
    target = {"config.json": sha, "chat_template.jinja": other}
    new = {"model": {"target": {"name": "/new/place"}}, "inputs": {"target": target, "data": [["x", 1]]}}
    old = {"model": {"target": {"name": "/old/target"}}}
    old |= {"inputs": {"target/config.json": sha, "target/notes.json": other, "data": [["x", 1]]}}
    assert differences(old, new, "attention_tuning") == []
    old["inputs"]["target/config.json"] = other
    assert differences(old, new, "attention_tuning") == [f"inputs.target.config.json: {'b' * 12} -> {'a' * 12}"]
    hub = {"model": {"target": {"name": "owner/a", "revision": None}}, "inputs": {"data": [["x", 1]]}}
    now = {"model": {"target": {"name": "owner/b"}}, "inputs": {"target": {"repository": "owner/b", "commit": "1"}}}
    now["inputs"]["data"] = [["x", 1]]
    assert differences(hub, now, "attention_tuning") == ["inputs.target.repository: owner/a -> owner/b"]


def test_a_moved_class_of_this_project_is_the_same_class():
    def record(module: str) -> dict:
        inputs = {"target": {"config.json": "a" * 64}, "data": []}
        return {"inputs": inputs, "stage": {"module": {"_target_": module}}}

    old, moved = record("train.modules.AttentionTuning"), record("train.loop.modules.AttentionTuning")
    assert differences(old, moved, "attention_tuning") == []
    assert differences(old, record("train.loop.modules.Other"), "attention_tuning") != []
    assert differences(record("a.Module"), record("b.Module"), "attention_tuning") != []  # user classes


def test_a_record_with_renamed_settings_is_compared_under_the_new_names(tmp_path):
    def record(stage: dict, data: dict) -> dict:
        return {"inputs": {"target": {"config.json": "a" * 64}, "data": []}, "stage": stage, "data": data}

    file = tmp_path / "attention_tuning.done.json"
    saved = record({"rows_per_step": 4, "module": {"told_share": 0.5}}, {"row_length": 320})
    file.write_text(json.dumps({"settings": saved}))
    old = read_record(file)["settings"]
    new = record({"global_batch_size": 4, "module": {"bonus_slot_fraction": 0.5}}, {"max_seq_len": 320})
    assert differences(old, new, "attention_tuning") == []
    new["stage"]["global_batch_size"] = 8
    assert differences(old, new, "attention_tuning") == ["stage.global_batch_size: 4 -> 8"]


def test_a_record_from_before_a_part_existed_is_one_without_it():
    new = {"model": {"draft": asdict(DraftConfig(num_layers=6, block_size=8, calibrator_rank=256))}}
    old = {"model": {"draft": {"num_layers": 6, "block_size": 8, "calibrator_rank": 256}}, "inputs": {"target": {}}}
    new["inputs"] = {"target": {}}
    assert differences(old, new, "bonus_calibration") == []
    new["model"]["draft"]["chain_rank"] = 16
    assert differences(old, new, "bonus_calibration") == ["model.draft.chain_rank: 0 -> 16"]
