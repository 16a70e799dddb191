"""The target loads as in transformers, or one error gives the reason."""

import copy
import json
import shutil

import pytest
import torch
from helpers.configs import composed
from helpers.forked import forked_command
from helpers.shared import ARCHITECTURE, TINY, random_draft, random_target
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from data.errors import UserError
from models.custom_generate import generate as shipped
from models.decoding.flex import MODES, generate
from models.decoding.selection import OFF
from models.export.artifact_io import export_draft, load_draft
from models.target import load_config, load_target
from models.verify.run import verify
from train.context import Resources


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("target")
    random_target().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16, "float16", torch.float64])
def test_a_dtype_is_accepted_in_every_form(dtype, saved):
    expected = getattr(torch, str(dtype).removeprefix("torch."))
    assert load_target(saved, dtype=dtype).dtype == expected
    assert load_target(None, architecture=ARCHITECTURE, dtype=dtype).dtype == expected


def test_auto_selects_the_stored_dtype():
    assert load_target(TINY / "target", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["int8", torch.int8, "float23", "nn", "", None, 32, "Tensor"])
def test_a_dtype_that_is_not_floating_point_is_rejected(dtype, saved):
    with pytest.raises(ValueError, match=f"dtype={dtype!r}: expected auto or a floating-point dtype"):
        load_target(saved, dtype=dtype)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, torch.device("cpu"), "auto"])
def test_a_single_device_is_accepted(device_map, saved):
    target = load_target(saved, device_map=device_map)
    assert target.device.type == "cpu" and not target.training


def test_random_weights_reject_checkpoint_options():
    for settings in ({"device_map": "cpu"}, {"dtype": "auto"}, {"quantization_config": {}}):
        with pytest.raises(ValueError, match="not supported for random weights"):
            load_target(None, architecture=ARCHITECTURE, **settings)


def test_a_drafter_is_rejected_as_a_target(tmp_path):
    export_draft(random_draft(random_target()), tmp_path, torch.float32)
    with pytest.raises(ValueError, match="an exported drafter, not a target"):
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
    "weights missing": (changed(without), "the target's weights are missing model.layers.3.mlp"),
    "weights of another shape": (changed(narrow), "failed to load the target"),
    "weights cut": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:5000]),
        "failed to load the target",
    ),
    "config cut": (lambda d: (d / "config.json").write_text('{"model_'), "config.json"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_target_is_rejected_by_name(name, saved, tmp_path):
    damage, text = DAMAGES[name]
    shutil.copytree(saved, tmp_path / "target")
    damage(tmp_path / "target")
    with pytest.raises((ValueError, OSError)) as caught:
        load_target(tmp_path / "target")
    assert text in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_wrapped_target_is_rejected_with_a_fix(tmp_path):
    from peft import LoraConfig, get_peft_model

    export_draft(random_draft(random_target()), tmp_path, torch.float32)
    wrapped = get_peft_model(random_target(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UserError, match=r"PeftModel.*; expected a transformers model.*get_base_model\(\)"):
        load_draft(tmp_path, wrapped)
    with pytest.raises(UserError, match="NoneType; expected a transformers model"):
        load_draft(tmp_path, None)


@pytest.mark.slow(but="[{}-98]")
@pytest.mark.parametrize("rows", [98, 128])
@pytest.mark.parametrize("beyond", [{}, {"bonus_slot": True, "chain_rank": 4}, {"rank": 0}], ids=str)
def test_a_target_with_added_embedding_rows_is_decoded_losslessly(rows, beyond, tmp_path):
    """Holds for every loader of drafters; all reject a target with fewer rows with the same message."""
    target = random_target()
    export_draft(random_draft(target, **beyond), tmp_path / "drafter", torch.float32)
    target.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():  # so that the target sometimes chooses them
        target.get_output_embeddings().weight[97:] = 1.5 * target.get_output_embeddings().weight[: rows - 97]
    target.generation_config.eos_token_id = None
    target.save_pretrained(tmp_path / "target")
    loaded = load_target(tmp_path / "target")
    draft = load_draft(tmp_path / "drafter", loaded)
    prompts = [[5, 6, 7, 97], [8, 9], [96, rows - 1, 4]]
    own = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        how = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 16}
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
        own.append(plain.generate(ids, **how)[0, len(prompt) :].tolist())
        shown = shipped.generate(plain, inputs=ids, drafter=str(tmp_path / "drafter"), **how)
        assert shown[0, len(prompt) :].tolist() == own[-1]
    assert rows == 98 or any(token >= 97 for answer in own for token in answer)
    for mode in MODES:
        assert generate(loaded, draft, prompts, max_new_tokens=16, mode=mode, selection=OFF).tokens == own
    checks = list(verify(tmp_path / "drafter", tmp_path / "target", max_new_tokens=8))
    assert checks[-1].name == "decoding" and not any(check.faults for check in checks)


def test_a_target_with_fewer_embedding_rows_is_rejected_with_the_same_message(tmp_path):
    target = random_target()
    export_draft(random_draft(target), tmp_path, torch.float32)
    target.resize_token_embeddings(90, mean_resizing=False)
    for load in (lambda: load_draft(tmp_path, target), lambda: shipped._settings(tmp_path, target.config)):
        with pytest.raises(ValueError, match="for a target with vocab_size=97, but this one has 90"):
            load()


@pytest.mark.slow
def test_training_with_a_quantized_target_is_rejected_before_loading(tmp_path):
    shutil.copytree(TINY / "target", tmp_path / "target")
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "target" / "config.json").write_text(json.dumps(config))
    (tmp_path / "target" / "model.safetensors").unlink()
    done = forked_command("+experiment=tiny", f"model.target.name={tmp_path / 'target'}", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "The target is quantized" in done.stderr and "Train with the original, unquantized model" in done.stderr


@pytest.mark.parametrize("in_the_data", [False, True])
def test_a_tokenizer_may_have_more_tokens_than_the_target_but_not_the_data(tmp_path, tiny_tokenizer, in_the_data):
    shutil.copytree(TINY / "target", tmp_path / "target")
    tokenizer = copy.deepcopy(tiny_tokenizer)
    rows = load_config(str(tmp_path / "target")).vocab_size
    tokenizer.add_tokens([f"<more{i}>" for i in range(rows + 1 - len(tokenizer))])
    assert len(tokenizer) == rows + 1
    tokenizer.save_pretrained(tmp_path / "target")
    word = f"<more{rows - len(tiny_tokenizer)}>" if in_the_data else "seven"
    answer = {"role": "assistant", "content": f"one two three four five six {word}"}
    turns = [{"role": "user", "content": "Count."}, answer]
    (tmp_path / "data.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 3)
    config = composed(
        "+experiment=tiny",
        f"run_dir={tmp_path}",
        f"model.target.name={tmp_path / 'target'}",
        f"data.path={tmp_path / 'data.jsonl'}",
        "data.validation_records=1",
    )
    resources = Resources(config)
    resources.check_shape()
    if in_the_data:
        with pytest.raises(
            UserError, match=f"produces token id {rows}, but the target's largest token id is {rows - 1}"
        ):
            resources.rows  # noqa: B018
    else:
        assert len(resources.rows[0])
