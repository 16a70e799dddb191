"""The artifact: exactly the contract's keys, shapes and config; the same drafts after loading."""

import json

import pytest
import torch
from helpers.shared import random_draft, random_target
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, DynamicCache

from models.decoding.reference import draft_logits
from models.draft import DraftModel
from models.export import artifact_io as export
from models.export.artifact_io import export_draft, load_draft
from models.hf_cache import forward_cached

LAYERS, BLOCK, RANK, HIDDEN, VOCABULARY = 3, 6, 8, 32, 97


def contract() -> dict[str, tuple[int, ...]]:
    """Return names and shapes, written out from the contract and the sizes above, independent of the code."""
    shapes = {
        "mask_embedding": (HIDDEN,),
        "anchor_bias_mlp.0.weight": (RANK, 2 * HIDDEN),
        "anchor_bias_mlp.0.bias": (RANK,),
        "anchor_bias_mlp.2.weight": (VOCABULARY, RANK),
        "anchor_bias_mlp.2.bias": (VOCABULARY,),
    }
    for i in range(LAYERS):
        attention = f"layers.{i}.self_attn"
        shapes |= {f"{attention}.q_proj.weight": (32, HIDDEN), f"{attention}.o_proj.weight": (HIDDEN, 32)}
        shapes |= {f"{attention}.{p}_proj.weight": (16, HIDDEN) for p in "kv"}
        shapes |= {f"{attention}.{p}_norm.weight": (8,) for p in "qk"}
    return shapes


@pytest.fixture
def exported(tmp_path):
    target = random_target()
    draft = random_draft(target, num_layers=LAYERS, block_size=BLOCK, rank=RANK)
    export_draft(draft, tmp_path, torch.float32)
    return target, draft, tmp_path


def test_keys_and_shapes_are_the_contracts(exported):
    _, _, directory = exported
    assert {name: tuple(t.shape) for name, t in load_file(directory / "model.safetensors").items()} == contract()
    files = {str(f.relative_to(directory)) for f in directory.rglob("*") if f.is_file()}
    assert files == {"config.json", "custom_generate/generate.py", "model.safetensors"}


def test_config_and_weights_have_the_same_file_permissions(exported):
    _, _, directory = exported
    modes = {file.stat().st_mode for file in (directory / "config.json", directory / "model.safetensors")}
    assert len(modes) == 1


def test_config_is_the_contracts(exported):
    _, _, directory = exported
    config = json.loads((directory / "config.json").read_text())
    settings = {"target_layer_ids": [2, 3, 4], "enable_anchor_bias_logits": True, "anchor_bias_rank": RANK}
    assert config["flexdraft_config"] == config["dflash_config"] == settings
    expected = {
        "model_type": "qwen3",
        "num_hidden_layers": LAYERS,
        "num_target_layers": 5,
        "layer_types": ["full_attention"] * LAYERS,
        "block_size": BLOCK,
        "hidden_size": HIDDEN,
        "vocab_size": VOCABULARY,
        "rope_theta": 10000.0,
        "dtype": "float32",
    }
    assert {key: config[key] for key in expected} == expected
    assert config["rope_parameters"]["rope_theta"] == 10000.0
    assert not any("path" in key for key in config)


def test_transformers_reads_the_config(exported):
    _, _, directory = exported
    config = AutoConfig.from_pretrained(directory)
    assert config.model_type == "qwen3" and config.num_hidden_layers == LAYERS and config.block_size == BLOCK
    assert config.rope_parameters["rope_theta"] == 10000.0


@torch.no_grad()
def test_loading_gives_bit_identical_drafts(exported):
    target, draft, directory = exported
    again = load_draft(directory, target)
    cache = DynamicCache()
    forward_cached(target, torch.randint(3, 97, (1, 12)), cache)
    for bonus in (None, torch.tensor([7])):
        assert torch.equal(draft_logits(draft, cache, 12, bonus), draft_logits(again, cache, 12, bonus))


def test_same_weights_same_bytes(exported, tmp_path_factory):
    target, draft, directory = exported
    other = tmp_path_factory.mktemp("other")
    export_draft(load_draft(directory, target), other, torch.float32)
    for file in (f for f in directory.rglob("*") if f.is_file()):
        assert file.read_bytes() == (other / file.relative_to(directory)).read_bytes()


@torch.no_grad()
def test_large_artifacts_are_sharded_and_read_back(exported, tmp_path_factory, monkeypatch):
    target, draft, _ = exported
    directory = tmp_path_factory.mktemp("sharded")
    monkeypatch.setattr(export, "MAX_SHARD_BYTES", 20_000)
    export_draft(draft, directory, torch.float32)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == contract().keys() and len(set(index["weight_map"].values())) > 1
    for name, parameter in load_draft(directory, target).own_parameters().items():
        assert torch.equal(parameter, draft.own_parameters()[name])


def test_a_complete_artifact_contains_the_releases_module_and_drafts_the_same(exported, tmp_path_factory):
    target, draft, _ = exported
    directory = tmp_path_factory.mktemp("complete")
    export_draft(draft, directory, torch.float32, complete=True)
    tensors = load_file(directory / "model.safetensors")
    shared = {"norm.weight": target.model.norm.weight}
    for i in range(LAYERS):
        layer = target.model.layers[2 + i]
        norms = {name: getattr(layer, name).weight for name in ("input_layernorm", "post_attention_layernorm")}
        shared |= {f"layers.{i}.{name}.weight": weight for name, weight in norms.items()}
        shared |= {
            f"layers.{i}.mlp.{p}_proj.weight": getattr(layer.mlp, f"{p}_proj").weight for p in ("gate", "up", "down")
        }
    assert tensors.keys() == contract().keys() | shared.keys()
    assert all(torch.equal(tensors[name], weight) for name, weight in shared.items())
    own = draft.own_parameters()
    assert all(torch.equal(p, own[name]) for name, p in load_draft(directory, target).own_parameters().items())


def test_bfloat16_halves_the_file_and_is_recorded(exported, tmp_path_factory):
    _, draft, _ = exported
    directory = tmp_path_factory.mktemp("bf16")
    export_draft(draft, directory, torch.bfloat16)
    assert all(t.dtype == torch.bfloat16 for t in load_file(directory / "model.safetensors").values())
    assert json.loads((directory / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_drafter_for_another_target_is_rejected(exported):
    _, _, directory = exported
    with pytest.raises(ValueError, match="vocab_size=97, but this one has 90"):
        load_draft(directory, random_target(vocab_size=90))
    with pytest.raises(ValueError, match="num_target_layers=5, but this one has 6"):
        load_draft(directory, random_target(num_hidden_layers=6))


def test_a_damaged_directory_is_rejected_by_name(exported):
    target, _, directory = exported
    tensors = load_file(directory / "model.safetensors")
    embedding = tensors.pop("mask_embedding")
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ValueError, match="mask_embedding: missing from the weights"):
        load_draft(directory, target)
    save_file(tensors | {"mask_embedding": embedding[:-1].clone()}, directory / "model.safetensors")
    with pytest.raises(ValueError, match=r"mask_embedding: has shape \(31,\) in model.safetensors; expected \(32,\)"):
        load_draft(directory, target)


def test_non_finite_weights_are_not_exported(exported, tmp_path_factory):
    _, draft, _ = exported
    with torch.no_grad():
        draft.mask_embedding[0] = float("nan")
    directory = tmp_path_factory.mktemp("nan")
    with pytest.raises(ValueError, match="Non-finite values in mask_embedding"):
        export_draft(draft, directory, torch.float32)
    assert not list(directory.iterdir())


@pytest.fixture
def beyond(exported, tmp_path_factory):
    """Return a pair with bonus slot and chain."""
    directory = tmp_path_factory.mktemp("beyond")
    draft = random_draft(exported[0], num_layers=LAYERS, block_size=BLOCK, rank=RANK, bonus_slot=True, chain_rank=5)
    export_draft(draft, directory, torch.float32)
    return draft, directory, load_file(directory / "model.safetensors")


def logits_of(drafts: list[DraftModel]) -> list[torch.Tensor]:
    """Return the logits of one block of each drafter after the same random prompt."""
    target, cache = drafts[0].target, DynamicCache()
    forward_cached(target, torch.randint(3, 97, (1, 12)), cache)
    return [draft_logits(draft, cache, 12, torch.tensor([7])) for draft in drafts]


@torch.no_grad()
def test_extensions_beyond_the_contract_are_exported_and_read_back(exported, beyond):
    target, _, directory = exported
    draft, other, tensors = beyond
    more = {"bonus_slot.weight": (HIDDEN, HIDDEN), "chain_mlp.0.weight": (5, 2 * HIDDEN), "chain_mlp.0.bias": (5,)}
    more |= {"chain_mlp.2.weight": (VOCABULARY, 5), "chain_mlp.2.bias": (VOCABULARY,)}
    assert {name: tuple(t.shape) for name, t in tensors.items()} == contract() | more
    plain, config = (json.loads((d / "config.json").read_text())["flexdraft_config"] for d in (directory, other))
    assert config == plain | {"bonus_slot": True, "chain_rank": 5}
    one, again = logits_of([draft, load_draft(other, target)])
    assert torch.equal(one, again)
    del tensors["chain_mlp.0.bias"]
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(ValueError, match="chain_mlp.0.bias: missing from the weights"):
        load_draft(other, target)


@torch.no_grad()
def test_a_decoder_that_knows_only_the_contract_can_use_the_export(exported, beyond):
    """`without_extras` drafts as a reader that uses only the contract's keys and tensors."""
    draft, directory, tensors = beyond
    config = json.loads((directory / "config.json").read_text())
    for key in ("flexdraft_config", "dflash_config"):
        config[key] = {name: config[key][name] for name in config[key] if name not in ("bonus_slot", "chain_rank")}
    (directory / "config.json").write_text(json.dumps(config))
    save_file({name: tensors[name] for name in contract()}, directory / "model.safetensors")
    public = load_draft(directory, exported[0])
    assert public.bonus_slot is None and public.chain_mlp is None and draft.chain_mlp is not None
    expected, plain, full = logits_of([public, draft.without_extras(), draft])
    assert torch.equal(plain, expected) and not torch.equal(full, expected)


def test_a_relative_of_the_target_causes_a_warning_and_the_target_itself_does_not(exported, recwarn):
    target, _, directory = exported
    load_draft(directory, target)
    load_draft(directory, random_target("bfloat16"))
    assert not recwarn.list
    with pytest.warns(UserWarning, match="unrelated weights"):
        load_draft(directory, random_target(seed=4))
    with torch.no_grad():
        target.model.layers[1].mlp.up_proj.weight.mul_(1.1)
    with pytest.warns(UserWarning, match=r"1 of \d+ sampled tensors differ .*up_proj.*: probably a fine-tuned variant"):
        load_draft(directory, target)


def test_an_artifact_without_a_fingerprint_loads_without_a_warning(exported, recwarn):
    _, _, directory = exported
    config = json.loads((directory / "config.json").read_text())
    del config["target_fingerprint"]
    (directory / "config.json").write_text(json.dumps(config))
    load_draft(directory, random_target(seed=4))
    assert not recwarn.list
