"""A target is identified by content: from a directory, by Hub ID, and after its configs are re-saved."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from helpers.configs import composed
from helpers.shared import ROOT, TINY

from train.context import Resources
from train.resume.identity import differences
from train.run_dir import target_files as module
from train.run_dir.drafter_file import check_fits, facts_of
from train.run_dir.target_files import JSON, comparable, hashes, in_directory, on_hub, target_files, tokenizer_files

COMMIT = "1" * 40
SHA, OTHER = "a" * 64, "b" * 64


@pytest.fixture
def target(tmp_path):
    shutil.copytree(TINY / "target", tmp_path / "target")
    return tmp_path / "target"


def content(directory):
    return hashes(target_files(in_directory(directory)))


def change(file, **values):
    """Re-save a JSON file with another key order and layout."""
    found = json.loads(file.read_text())
    found = {**values, **{key: value for key, value in reversed(found.items()) if key not in values}}
    file.write_text(json.dumps(found, indent=7))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("config.json", {"transformers_version": "9.9.9", "dtype": "bfloat16", "_name_or_path": "/elsewhere"}),
        ("config.json", {"torch_dtype": "float16", "transformers_version": None}),
        ("generation_config.json", {"transformers_version": "9.9.9"}),
        ("tokenizer_config.json", {"name_or_path": "/elsewhere", "transformers_version": "9", "is_local": True}),
    ],
)
def test_a_resaved_config_is_the_same_target(name, values, target):
    before = content(target)
    change(target / name, **values)
    assert content(target) == before and before[name].startswith(JSON)
    change(target / name, **values, extra=1)
    assert content(target)[name] != before[name]


def test_nested_config_values_count_but_not_their_origin(target):
    change(target / "config.json", text_config={"dtype": "float32", "rope_theta": 1.0})
    before = content(target)
    change(target / "config.json", text_config={"dtype": "bfloat16", "rope_theta": 1.0})
    assert content(target) == before
    change(target / "config.json", text_config={"dtype": "bfloat16", "rope_theta": 2.0})
    assert content(target)["config.json"] != before["config.json"]


def test_a_damaged_config_is_hashed_by_content(target):
    (target / "config.json").write_text('{"half')
    assert len(content(target)["config.json"]) == 64
    (target / "model.safetensors").rename(target / "model.safetensors.index.json")  # not JSON
    assert "model.safetensors.index.json" in content(target)


def test_a_weight_index_is_identified_by_its_tensor_map(target):
    index = {"weight_map": {"x": "model-1.safetensors"}, "metadata": {"total_size": 1}}
    (target / "model.safetensors").rename(target / "model-1.safetensors")
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    before = content(target)
    (target / "model.safetensors.index.json").write_text(json.dumps(index | {"metadata": {"total_parameters": 2}}))
    assert content(target) == before and "model-1.safetensors" in before


IDENTITY = """
import json, sys
from data.config.compose import composed
from train.context import Resources
print(json.dumps(Resources(composed(["+experiment=tiny", *sys.argv[1:]])).target_identity))
"""


@pytest.mark.slow
def test_a_hub_id_and_a_directory_of_the_same_files_are_one_target(target, tmp_path):
    """Use a cache written by plain transformers, on a node without network."""
    cached = tmp_path / "hub" / "models--acme--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(COMMIT)
    shutil.copytree(target, cached / "snapshots" / COMMIT)
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")}
    environment |= {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")}
    overrides = ["model.target.name=acme/tiny", "model.target.tokenizer=acme/tiny"]
    done = subprocess.run([sys.executable, "-c", IDENTITY, *overrides], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    here = Resources(composed("+experiment=tiny", f"model.target.name={target}")).target_identity
    assert found == here | {"repository": "acme/tiny", "commit": COMMIT} and "model.safetensors" in found
    for then, now in ((found, here), (here, found)):
        old, new = ({"inputs": {"target": of, "data": []}} for of in (then, now))
        assert differences(old, new, "attention_tuning") == []
        config = composed("+experiment=tiny")
        check_fits(target, facts_of(config, then, calibrated=False), config, now, "export")


def test_files_missing_on_the_hub_are_skipped(target, monkeypatch):
    def cached_file(repository, name, revision):
        assert (repository, revision) == ("acme/tiny", COMMIT)
        if (target / name).is_file():
            return str(target / name)
        if name == "config.json":
            return None
        raise OSError("no such file, or no network")

    monkeypatch.setattr(module, "cached_file", cached_file)
    assert hashes(target_files(on_hub("acme/tiny", COMMIT))) == content(target)
    (target / "config.json").unlink()
    (target / "tokenizer.json").unlink()
    (target / "vocab.json").write_text("{}")
    assert [file.name for file in tokenizer_files(on_hub("acme/tiny", COMMIT))] == [
        "tokenizer_config.json",
        "chat_template.jinja",
        "vocab.json",
    ]


HUB = {"repository": "owner/a", "commit": "1"}
FILES = {"config.json": f"{JSON}{SHA}", "model.safetensors": SHA}
TOKENIZER = {"tokenizer": "owner/t", "tokenizer/a": SHA}
SAME = [
    ("a record without a commit", {"repository": "owner/a", "commit": None}, HUB | FILES),
    ("a record with a commit", HUB, HUB | FILES),
    ("another commit of the same content", HUB | {"commit": "2"} | FILES, HUB | FILES),
    ("another name of the same content", HUB | {"repository": "owner/b"} | FILES, HUB | FILES),
    ("the bytes of a config", FILES | {"config.json": OTHER}, FILES),
    (
        "a tokenizer by its name alone",
        FILES | {"tokenizer": "owner/t"},
        FILES | TOKENIZER,
    ),
    ("a tokenizer's content", FILES | TOKENIZER, FILES | {"tokenizer/a": SHA}),
]
DIFFERENT = [
    ("another repository", {"repository": "owner/b", "commit": None}, HUB | FILES, "repository"),
    ("another commit of unknown content", HUB | {"commit": "2"}, HUB | FILES, "commit"),
    ("other weights", HUB | FILES | {"model.safetensors": OTHER}, HUB | FILES, "model.safetensors"),
    ("another config", FILES | {"config.json": f"{JSON}{OTHER}"}, FILES, "config.json"),
    ("other weights beside bytes of a config", {"config.json": OTHER, "model.safetensors": OTHER}, FILES, "model"),
    ("a file that was added", {"model.safetensors": SHA}, FILES, "config.json"),
    ("a tokenizer that was added", FILES, FILES | TOKENIZER, "tokenizer"),
    ("another tokenizer", FILES | {"tokenizer": "o/s"}, FILES | {"tokenizer": "o/t", "tokenizer/a": SHA}, "tokenizer"),
]


@pytest.mark.parametrize(("then", "now"), [case[1:] for case in SAME], ids=[case[0] for case in SAME])
def test_an_unrecorded_entry_is_not_a_difference(then, now):
    assert comparable(then, now) == now


@pytest.mark.parametrize(("then", "now", "name"), [c[1:] for c in DIFFERENT], ids=[c[0] for c in DIFFERENT])
def test_entries_of_both_identities_are_compared(then, now, name):
    old, new = ({"inputs": {"target": of}} for of in (then, now))
    assert any(line.startswith(f"inputs.target.{name}") for line in differences(old, new, "attention_tuning"))
