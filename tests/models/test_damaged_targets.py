"""Each damaged file of a target is one error of `models.verify` that names it: no traceback, no success."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from helpers.shared import TINY, random_draft, random_target

from data.errors import UserError
from models.export.artifact_io import export_draft
from models.target import load_config, load_target, load_tokenizer
from models.verify.run import verify

COPIED = ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")  # of the embedded target
JSON_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """Save `target`, with a tokenizer, and `export`, a drafter for it."""
    root = tmp_path_factory.mktemp("healthy")
    target = random_target(vocab_size=2048)
    target.save_pretrained(root / "target")
    for name in COPIED:
        shutil.copy(TINY / "target" / name, root / "target")
    export_draft(random_draft(target), root / "export", torch.float32)
    return root


def outcome(export: Path, target: Path) -> tuple[str, str]:
    """Run `models.verify`. Return `error`, `fault` or `ok`, and its message."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            checks = list(verify(export, target, max_new_tokens=2))
        except (ValueError, OSError) as error:
            return "error", str(error)
    faults = [fault for check in checks for fault in check.faults]
    return ("fault", " ".join(faults)) if faults else ("ok", " ".join(w for check in checks for w in check.warnings))


HOW = {
    "empty": lambda file: file.write_bytes(b""),
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "zeros": lambda file: file.write_bytes(b"\0" * file.stat().st_size),
    "not text": lambda file: file.write_bytes(b"\xff" * 300),
    "a list": lambda file: file.write_text("[1]"),
    "a string": lambda file: file.write_text('"a"'),
    "a number": lambda file: file.write_text("7"),
    "null": lambda file: file.write_text("null"),
    "nested": lambda file: file.write_text("[" * 100_000),
    "a directory": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("name", [*JSON_FILES, "model.safetensors"])
@pytest.mark.parametrize("how", HOW)
def test_a_damaged_file_of_the_target_is_named(how, name, healthy, tmp_path):
    target = shutil.copytree(healthy / "target", tmp_path / "target")
    HOW[how](target / name)
    kind, text = outcome(healthy / "export", target)
    assert kind == "error" and f"{name}: " in text and str(target) in text and "Copy or download it again" in text


@pytest.mark.parametrize("how", ["not text", "a directory"])
def test_a_damaged_chat_template_is_named(how, healthy, tmp_path):
    target = shutil.copytree(healthy / "target", tmp_path / "target")
    HOW[how](target / "chat_template.jinja")
    kind, text = outcome(healthy / "export", target)
    assert kind == "error" and "chat_template.jinja: unreadable" in text


MISSING = {
    "config.json": "config.json",
    "model.safetensors": "model.safetensors",
    "tokenizer.json": "failed to load the tokenizer from tokenizer_config.json",
}


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_file_of_the_target_is_detected(name, healthy, tmp_path):
    target = shutil.copytree(healthy / "target", tmp_path / "target")
    (target / name).unlink()
    kind, text = outcome(healthy / "export", target)
    assert kind == "error" and MISSING[name] in text


def test_a_target_without_any_tokenizer_file_is_decoded_with_random_tokens(healthy, tmp_path):
    target = shutil.copytree(healthy / "target", tmp_path / "target")
    for name in COPIED:
        (target / name).unlink()
    kind, text = outcome(healthy / "export", target)
    assert kind == "ok" and "the target has no tokenizer" in text


STRAY = {
    "pytorch_model.bin": (b"garbage", b""),
    "model.safetensors.index.json": (b"{}", b"[]", b'{"weight_map": {"a": 1}}', b'{"weight_map": {"a": "b"}}'),
    "adapter_config.json": (b"garbage", b"{}"),
}


@pytest.mark.parametrize(("name", "content"), [(name, content) for name in STRAY for content in STRAY[name]])
def test_garbage_weights_are_named_and_unused_files_are_not_read(name, content, healthy, tmp_path):
    target = shutil.copytree(healthy / "target", tmp_path / "target")
    (target / name).write_bytes(content)
    kind, text = outcome(healthy / "export", target)
    assert kind == "ok" or (kind == "error" and name in text)
    assert (kind == "ok") >= (name == "pytorch_model.bin")
    (target / "model.safetensors").unlink()
    kind, text = outcome(healthy / "export", target)
    assert kind == "error" and (name in text or "model.safetensors" in text)


VALUES = (None, "text", -1, 0, 1.5, True, [], {}, [1, "a"], {"a": 1}, float("nan"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_no_value_in_the_targets_configs_causes_a_raw_error(name, healthy, tmp_path):
    """Each value gives a result or one error that names the target or the setting."""
    target = shutil.copytree(healthy / "target", tmp_path / "target")
    config = json.loads((target / name).read_text())
    more = ("sliding_window", "rope_scaling", "quantization_config", "dtype") if name == "config.json" else ()
    for number, (key, value) in enumerate((key, value) for key in [*config, *more] for value in VALUES):
        (target / name).write_text(json.dumps(config | {key: value}))
        if name == "config.json" and number % 3:  # faster: the config alone
            try:
                load_config(str(target))
            except (ValueError, OSError) as error:
                assert str(target) in str(error), (key, value)
            continue
        kind, text = outcome(healthy / "export", target)
        assert kind != "error" or str(target) in text or key in text or "token" in text, (key, value, text)


LOADERS = {"config.json": load_config, "model.safetensors": load_target, "tokenizer.json": load_tokenizer}


@pytest.mark.parametrize("name", LOADERS)
def test_each_loader_names_the_damaged_file(name, healthy, tmp_path):
    target = shutil.copytree(healthy / "target", tmp_path / "target")
    (target / name).write_bytes(b"\xff" * 300)
    with pytest.raises(UserError, match=rf"target: failed to load the .*\. {name}: "):
        LOADERS[name](str(target))


def test_a_config_that_is_not_an_object_is_one_fault_even_with_altered_code(healthy, tmp_path):
    """The decoder's checksum is looked up in the config."""
    export = shutil.copytree(healthy / "export", tmp_path / "export")
    (export / "custom_generate" / "generate.py").write_text("")
    for content in ("[]", "7", "null", '"a"'):
        (export / "config.json").write_text(content)
        kind, text = outcome(export, healthy / "target")
        assert kind == "fault" and "config.json: contains a JSON" in text
        with pytest.raises(ValueError, match="config.json: contains a JSON"):
            load_target(str(export))
