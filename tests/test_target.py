"""The target loads as transformers loads it, or one error says why not."""

import json
import shutil

import pytest
import torch
from conftest import ARCHITECTURE, TINY, command, random_draft, random_target
from safetensors.torch import load_file, save_file

from data.errors import UserError
from models.export import export_draft, load_draft
from models.target import load_target


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("target")
    random_target().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16, "float16", torch.float64])
def test_a_dtype_is_taken_in_every_form(dtype, saved):
    expected = getattr(torch, str(dtype).removeprefix("torch."))
    assert load_target(saved, dtype=dtype).dtype == expected
    assert load_target(None, architecture=ARCHITECTURE, dtype=dtype).dtype == expected


def test_auto_is_the_dtype_of_the_file():
    assert load_target(TINY / "target", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["int8", torch.int8, "float23", "nn", "", None, 32, "Tensor"])
def test_what_is_no_floating_dtype_is_refused(dtype, saved):
    with pytest.raises(ValueError, match=f"dtype={dtype!r} is no floating dtype"):
        load_target(saved, dtype=dtype)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, torch.device("cpu"), "auto"])
def test_one_device_is_taken(device_map, saved):
    target = load_target(saved, device_map=device_map)
    assert target.device.type == "cpu" and not target.training


def test_random_weights_take_no_settings_of_files():
    for settings in ({"device_map": "cpu"}, {"dtype": "auto"}, {"quantization_config": {}}):
        with pytest.raises(ValueError, match="Random weights take a dtype alone"):
            load_target(None, architecture=ARCHITECTURE, **settings)


def test_a_drafter_is_no_target(tmp_path):
    export_draft(random_draft(random_target()), tmp_path, torch.float32)
    with pytest.raises(ValueError, match="an exported drafter, no target"):
        load_target(tmp_path)


def without(tensors):
    return {name: tensor for name, tensor in tensors.items() if "layers.3.mlp" not in name}


def narrow(tensors):
    return tensors | {"model.norm.weight": torch.ones(7)}


def changed(change):
    def damage(directory):
        save_file(change(load_file(directory / "model.safetensors")), directory / "model.safetensors", {"format": "pt"})

    return damage


DAMAGES = {
    "weights missing": (changed(without), "tensors are missing from the target's weights: model.layers.3.mlp"),
    "weights of another shape": (changed(narrow), "the target did not load"),
    "weights cut": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:5000]),
        "the target did not load",
    ),
    "config cut": (lambda d: (d / "config.json").write_text('{"model_'), "config.json"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_target_is_refused_by_name(name, saved, tmp_path):
    damage, text = DAMAGES[name]
    shutil.copytree(saved, tmp_path / "target")
    damage(tmp_path / "target")
    with pytest.raises((ValueError, OSError)) as caught:
        load_target(tmp_path / "target")
    assert text in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_wrapped_target_is_refused_with_the_way_out(tmp_path):
    from peft import LoraConfig, get_peft_model

    export_draft(random_draft(random_target()), tmp_path, torch.float32)
    wrapped = get_peft_model(random_target(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UserError, match=r"PeftModel.*; expected a model of transformers.*get_base_model\(\)"):
        load_draft(tmp_path, wrapped)
    with pytest.raises(UserError, match="NoneType; expected a model of transformers"):
        load_draft(tmp_path, None)


def test_rows_added_to_the_embeddings_are_refused_with_a_way_out_that_works(tmp_path):
    target = random_target()
    export_draft(random_draft(target), tmp_path, torch.float32)
    target.resize_token_embeddings(128)
    with pytest.raises(UserError, match=r"vocab_size=97, but this one has 128.*resize_token_embeddings\(97\)"):
        load_draft(tmp_path, target)
    target.resize_token_embeddings(97)
    load_draft(tmp_path, target)


@pytest.mark.slow
def test_training_beside_a_quantised_target_is_refused_before_it_loads(tmp_path):
    shutil.copytree(TINY / "target", tmp_path / "target")
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "target" / "config.json").write_text(json.dumps(config))
    (tmp_path / "target" / "model.safetensors").unlink()
    done = command("+experiment=tiny", f"model.target.name={tmp_path / 'target'}", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "The target is quantized" in done.stderr and "Name the model that it was made from" in done.stderr
