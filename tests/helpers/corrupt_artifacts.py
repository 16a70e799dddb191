"""Functions that damage an exported artifact, and a table of them."""

import json
import pickle
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
DECODER = "custom_generate/generate.py"
RECOMMENDATION = "recommended_decoding.json"
SETTINGS = ("flexdraft_config", "dflash_config")


def change_config(**changes):
    """Change keys of config.json; None removes a key."""

    def damage(directory: Path) -> None:
        config = json.loads((directory / CONFIG).read_text()) | changes
        config = {key: value for key, value in config.items() if value is not None}
        (directory / CONFIG).write_text(json.dumps(config))

    return damage


def change_settings(names=SETTINGS, **changes):
    """Change keys of flexdraft_config, dflash_config, or both."""

    def damage(directory: Path) -> None:
        config = json.loads((directory / CONFIG).read_text())
        change_config(**{name: config[name] | changes for name in names})(directory)

    return damage


def change_tensors(change):
    """Change the dictionary of all tensors in place."""

    def damage(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / WEIGHTS)

    return damage


def change_index(change):
    """Change the weight_map of the shard index in place."""

    def damage(directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text())
        change(index["weight_map"])
        (directory / INDEX).write_text(json.dumps(index))

    return damage


def write(name: str, content: bytes):
    return lambda directory: (directory / name).write_bytes(content)


def write_recommendation(content):
    return write(RECOMMENDATION, json.dumps(content).encode())


def cut(directory: Path) -> None:
    """Truncate a file, as in an interrupted copy."""
    content = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(content[: len(content) // 2])


def remove(name: str):
    return lambda directory: (directory / name).unlink()


def stray(name: str):
    return lambda directory: save_file({"other": torch.ones(2)}, directory / name)


def first_value(name: str, value: float):
    def change(tensors) -> None:
        tensors[name].view(-1)[0] = value

    return change_tensors(change)


def shorten(tensors) -> None:
    tensors["mask_embedding"] = tensors["mask_embedding"][:-1]


def to(dtype: torch.dtype, names=None):
    def change(tensors) -> None:
        tensors.update({name: tensors[name].to(dtype) for name in names or list(tensors)})

    return change_tensors(change)


ROPE = {"rope_theta": 5e5, "rope_type": "default"}
RECOMMENDED = {"selection": "best", "threshold": 0.1, "parallel_rows": 2, "calibrate": True}
# What is damaged -> (the artifact it is made from, the damage, the only complaint).
DAMAGES = {
    "no config": ("whole", remove(CONFIG), "files: config.json: missing"),
    "config cut": ("whole", write(CONFIG, b'{"model_type": "qwe'), "files: config.json: invalid JSON (Unterminated"),
    "config a list": ("whole", write(CONFIG, b"[]"), "files: config.json: contains a JSON list; expected an object"),
    "no weights": ("whole", remove(WEIGHTS), f"files: {WEIGHTS} and {INDEX}: missing; found no *.safetensors"),
    "weights truncated": ("whole", cut, f"files: {WEIGHTS}: truncated; it has "),
    "weights too long": (
        "whole",
        lambda d: (d / WEIGHTS).open("ab").write(b"more"),
        f"files: {WEIGHTS}: damaged; it has ",
    ),
    "weights garbage": (
        "whole",
        write(WEIGHTS, b"\xff" * 300),
        f"files: {WEIGHTS}: no safetensors header in 300 bytes",
    ),
    "weights empty": ("whole", write(WEIGHTS, b""), f"files: {WEIGHTS}: no safetensors header in 0 bytes"),
    "pickled weights": ("whole", write("pytorch_model.bin", pickle.dumps({})), "files: pytorch_model.bin: pickled"),
    "second weights": (
        "whole",
        stray("more.safetensors"),
        f"files: more.safetensors: unexpected weights in addition to {WEIGHTS}",
    ),
    "shard missing": (
        "shards",
        lambda d: min(d.glob("model-*")).unlink(),
        f"safetensors: missing, but {INDEX} lists tensors in it",
    ),
    "shard not in index": (
        "shards",
        stray("model-9.safetensors"),
        "files: model-9.safetensors: unexpected weights, not in",
    ),
    "index lacks a tensor": (
        "shards",
        change_index(lambda places: places.pop("mask_embedding")),
        "files: mask_embedding: found in model-",
    ),
    "index has a tensor too many": (
        "shards",
        change_index(lambda places: places.update(ghost=places["mask_embedding"])),
        "files: ghost: missing from model-",
    ),
    "index no JSON": ("shards", write(INDEX, b"{"), f"files: {INDEX}: expected JSON with a weight_map"),
    "no decoder": ("whole", remove(DECODER), f"files: {DECODER}: missing. Plain transformers needs it"),
    "decoder altered": (
        "whole",
        lambda d: (d / DECODER).open("a").write("import os"),
        f"files: {DECODER}: modified after the export (sha256",
    ),
    "decoder a directory": (
        "whole",
        lambda d: (remove(DECODER)(d), (d / DECODER).mkdir()),
        f"files: {DECODER}: missing. Plain transformers",
    ),
    "code beside the decoder": (
        "whole",
        write("custom_generate/helper.py", b""),
        "files: custom_generate/helper.py: unexpected Python file",
    ),
    "code for transformers": ("whole", write("modeling_x.py", b""), "files: modeling_x.py: unexpected Python file"),
    "weights a directory": (
        "whole",
        lambda d: (remove(WEIGHTS)(d), (d / WEIGHTS).mkdir()),
        f"files: {WEIGHTS}: not a readable file",
    ),
    "config a directory": (
        "whole",
        lambda d: (remove(CONFIG)(d), (d / CONFIG).mkdir()),
        "files: config.json: cannot be read (Is a directory)",
    ),
    "config not text": ("whole", write(CONFIG, b"\xff\xfe{"), "files: config.json: invalid JSON ('utf-8' codec"),
    "config nested without end": ("whole", write(CONFIG, b"[" * 100_000), "files: config.json: invalid JSON ("),
    "fingerprint": (
        "whole",
        change_config(target_fingerprint=[1]),
        "config.json: target_fingerprint is not a fingerprint",
    ),
    "block size 0": ("whole", change_config(block_size=0), "config: config.json: block_size is 0; expected"),
    "block size 1": ("whole", change_config(block_size=1), "config: config.json: block_size is 1; expected"),
    "block size beyond all positions": (
        "whole",
        change_config(block_size=10**9),
        "config: config.json: block_size is 1000000000; expected at most 256, the target's context length",
    ),
    "scaling of RoPE that the target has not": (
        "whole",
        change_config(rope_parameters=None, rope_scaling={"rope_type": "yarn", "factor": 4.0}),
        "config: config.json: rope_scaling is {'rope_type': 'yarn', 'factor': 4.0}; expected None",
    ),
    "block size as text": ("whole", change_config(block_size="8"), "config: config.json: block_size is '8'; expected"),
    "no FlexDraft settings": (
        "whole",
        change_config(flexdraft_config=None, dflash_config=None),
        "config: config.json: not a FlexDraft drafter; expected flexdraft_config or dflash_config to be an object",
    ),
    "one of the settings missing": (
        "whole",
        change_config(flexdraft_config=None),
        "config: config.json: flexdraft_config is missing or not an object",
    ),
    "settings differ": (
        "whole",
        change_settings(SETTINGS[1:], anchor_bias_rank=9),
        "config: config.json: flexdraft_config and dflash_config differ in anchor_bias_rank",
    ),
    "layers not the last": (
        "whole",
        change_settings(target_layer_ids=[1, 2, 3]),
        "config: config.json: target_layer_ids is [1, 2, 3]; expected [2, 3, 4], the target's last layers",
    ),
    "layers not consecutive": (
        "whole",
        change_settings(target_layer_ids=[1, 3, 4]),
        "config: config.json: target_layer_ids is [1, 3, 4]; expected [2, 3, 4], the target's last layers",
    ),
    "layers no numbers": (
        "whole",
        change_settings(target_layer_ids="last"),
        "config: config.json: target_layer_ids is 'last'; expected a list",
    ),
    "number of draft layers": (
        "whole",
        change_config(num_hidden_layers=5),
        "config: config.json: num_hidden_layers is 5; expected 3, the length of target_layer_ids",
    ),
    "number of target layers": (
        "whole",
        change_config(num_target_layers=None),
        "config: config.json: num_target_layers is None; expected 5, the target's number of layers",
    ),
    "kinds of layers": (
        "whole",
        change_config(layer_types=["full_attention"] * 5),
        "expected ['full_attention', 'full_attention', 'full_attention'], those of the target's last 3 layers",
    ),
    "calibrator without rank": (
        "whole",
        change_settings(anchor_bias_rank=0),
        "config: config.json: enable_anchor_bias_logits is true, but anchor_bias_rank is 0; expected >= 1",
    ),
    "rank without calibrator": (
        "no_calibrator",
        change_settings(anchor_bias_rank=8),
        "config: config.json: enable_anchor_bias_logits is false, but anchor_bias_rank is 8; expected 0",
    ),
    "flag as text": (
        "whole",
        change_settings(enable_anchor_bias_logits="yes"),
        "config: config.json: enable_anchor_bias_logits is 'yes'; expected true or false",
    ),
    "bonus slot as text": (
        "beyond",
        change_settings(bonus_slot="yes"),
        "config: config.json: bonus_slot is 'yes'; expected true or false",
    ),
    "chain of no rank": (
        "beyond",
        change_settings(chain_rank=-1),
        "config: config.json: chain_rank is -1; expected an integer >= 0",
    ),
    "biases that the target has not": (
        "whole",
        change_config(attention_bias=True),
        "config: config.json: attention_bias is True; expected False, the target's",
    ),
    "rope_theta": ("whole", change_config(rope_theta=5e5), "config.json: rope_theta is 500000.0; expected 10000.0"),
    "no rope_theta": ("whole", change_config(rope_theta=None), "config.json: rope_theta is None; expected 10000.0"),
    "rope_parameters": (
        "whole",
        change_config(rope_parameters=ROPE),
        "config: config.json: rope_parameters is {'rope_theta': 500000.0",
    ),
    "recommendation": (
        "whole",
        write_recommendation(RECOMMENDED),
        f"config: {RECOMMENDATION} is invalid: selection='best'",
    ),
    "recommendation for no rows": (
        "whole",
        write_recommendation(RECOMMENDED | {"selection": "off", "parallel_rows": -1}),
        f"config: {RECOMMENDATION} is invalid: parallel_rows is -1",
    ),
    "recommendation cut": (
        "whole",
        write_recommendation({"selection": "off", "threshold": 0.0}),
        f"config: {RECOMMENDATION} is invalid: 'parallel_rows' is missing",
    ),
    "recommendation not JSON": ("whole", write(RECOMMENDATION, b'{"sel'), f"config: {RECOMMENDATION}: invalid JSON"),
    "recommendation a list": ("whole", write(RECOMMENDATION, b"[]"), f"config: {RECOMMENDATION}: contains a JSON list"),
    "recommendation of an earlier version": (
        "whole",
        change_settings(recommended_decoding=RECOMMENDED),
        "config: config.json: recommended_decoding is invalid: selection='best'",
    ),
    "recommendation for no rows of an earlier version": (
        "whole",
        change_settings(recommended_decoding=RECOMMENDED | {"selection": "off", "parallel_rows": -1}),
        "config: config.json: recommended_decoding is invalid: parallel_rows is -1",
    ),
    "recommendation cut of an earlier version": (
        "whole",
        change_settings(recommended_decoding={"selection": "off", "threshold": 0.0}),
        "config: config.json: recommended_decoding is invalid: 'parallel_rows' is missing",
    ),
    "tensor missing": (
        "whole",
        change_tensors(lambda tensors: tensors.pop("mask_embedding")),
        "tensors: mask_embedding: missing from the weights; expected shape (32,)",
    ),
    "tensor unexpected": (
        "whole",
        change_tensors(lambda tensors: tensors.update({"lm_head.weight": torch.ones(97, 32)})),
        f"tensors: lm_head.weight: unexpected tensor in {WEIGHTS}",
    ),
    "chain missing": (
        "beyond",
        change_tensors(lambda tensors: tensors.pop("chain_mlp.2.bias")),
        "tensors: chain_mlp.2.bias: missing from the weights; expected shape (97,)",
    ),
    "bonus slot that nothing reads": (
        "whole",
        change_tensors(lambda tensors: tensors.update({"bonus_slot.weight": torch.ones(32, 32)})),
        f"tensors: bonus_slot.weight: unexpected tensor in {WEIGHTS}; config.json does not enable the bonus slot",
    ),
    "shape": (
        "whole",
        change_tensors(shorten),
        f"tensors: mask_embedding: has shape (31,) in {WEIGHTS}; expected (32,)",
    ),
    "shape of a complete artifact's tensor": (
        "complete",
        change_tensors(lambda tensors: tensors.update({"norm.weight": torch.ones(31)})),
        f"tensors: norm.weight: has shape (31,) in {WEIGHTS}; expected (32,)",
    ),
    "mixed dtypes": (
        "whole",
        to(torch.bfloat16, ["mask_embedding"]),
        "tensors: mixed dtypes: 22 tensors are float32, but mask_embedding is bfloat16",
    ),
    "not the config's dtype": (
        "whole",
        to(torch.bfloat16),
        "tensors: config.json: dtype is 'float32', but the tensors are bfloat16",
    ),
    "whole numbers": (
        "whole",
        to(torch.int64, ["mask_embedding"]),
        "tensors: mask_embedding: has dtype I64 in model.safetensors; expected one of",
    ),
    "nan": (
        "whole",
        first_value("anchor_bias_mlp.2.weight", float("nan")),
        "values: anchor_bias_mlp.2.weight: 1 of 776 values are not finite, the first at [0, 0]: nan",
    ),
    "infinity": (
        "whole",
        first_value("layers.1.self_attn.q_norm.weight", float("-inf")),
        "values: layers.1.self_attn.q_norm.weight: 1 of 8 values are not finite, the first at [0]: -inf",
    ),
    "a complete artifact's tensor altered": (
        "complete",
        first_value("layers.1.mlp.up_proj.weight", 7.0),
        "target: layers.1.mlp.up_proj.weight: differs from the target's tensor",
    ),
}
