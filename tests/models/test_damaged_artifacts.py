"""Each damage of an artifact is one clear error or has no effect; it never gives another drafter."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.corrupt_artifacts import (
    CONFIG,
    DAMAGES,
    DECODER,
    INDEX,
    SETTINGS,
    WEIGHTS,
    change_config,
    change_settings,
    change_tensors,
)
from helpers.shared import random_draft, random_target

from data.errors import UserError
from models.artifact import EARLIER_RECOMMENDATION, RECOMMENDATION, read_config, sha256
from models.decoding.selection import Selection
from models.export import artifact_io as export
from models.export.artifact_io import export_draft, load_draft
from models.export.recommendation import recommend, recommended
from models.verify.run import verify
from train.publish.upload import check_artifact

# Damages of parts that the loader never reads: the drafter loads anyway.
NOT_READ = {"pickled weights", "no decoder", "decoder altered", "decoder a directory", "code beside the decoder"}
NOT_READ |= {"code for transformers", "one of the settings missing", "mixed dtypes", "not the config's dtype"}
NOT_READ |= {"shape of a complete artifact's tensor", "a complete artifact's tensor altered", "kinds of layers absent"}
NOT_READ |= {"recommendation", "recommendation for no rows", "recommendation cut", "no rope_theta"}
NOT_READ |= {f"{name} of an earlier version" for name in ("recommendation", "recommendation cut")}
NOT_READ |= {"recommendation for no rows of an earlier version", "recommendation not JSON", "recommendation a list"}
SUITABLE = {"selection": "off", "threshold": 0.0, "parallel_rows": 2, "calibrate": True}


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """Return a target and its artifacts by name: plain, sharded, complete, without calibrator, beyond the paper."""
    root = tmp_path_factory.mktemp("healthy")
    target = random_target()
    export_draft(random_draft(target), root / "whole", torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "MAX_SHARD_BYTES", 20_000)
        export_draft(random_draft(target), root / "shards", torch.float32)
    export_draft(random_draft(target, rank=0), root / "no_calibrator", torch.float32)
    export_draft(random_draft(target), root / "complete", torch.float32, complete=True)
    export_draft(random_draft(target, bonus_slot=True, chain_rank=4), root / "beyond", torch.float32)
    target.save_pretrained(root / "target")
    return target, root


def clear(error: Exception, directory: Path) -> bool:
    """Return whether an error is of a documented type and names the directory."""
    return type(error) in (ValueError, UserError) and str(directory) in str(error) and len(str(error)) < 1500


def same(draft, other) -> bool:
    own = other.own_parameters()
    equal = all(torch.allclose(p, own[name], atol=0.05) for name, p in draft.own_parameters().items())
    return equal and draft.own_parameters().keys() == own.keys() and draft.split_layer == other.split_layer


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_artifact_does_not_load_or_loads_as_if_it_were_intact(name, healthy, tmp_path):
    target, root = healthy
    kind, damage, _ = DAMAGES[name]
    directory = shutil.copytree(root / kind, tmp_path / "artifact")
    damage(directory)
    if name in NOT_READ:
        assert same(load_draft(directory, target), load_draft(root / kind, target))
        return
    with pytest.raises(ValueError) as caught:
        load_draft(directory, target)
    assert clear(caught.value, directory), caught.value


VALUES = (None, "text", "", -1, 0, 1, 1.5, True, False, [], {}, [1, "a"], {"a": 1}, 10**12, float("nan"))


def outcomes(directory: Path, target, expected, context):
    """Run all readers; each must give a clear error or the result of the intact artifact."""
    try:
        assert same(load_draft(directory, target), expected), context
    except (ValueError, AssertionError) as error:
        assert clear(error, directory), (context, error)
    for reader in (recommended, read_config, check_artifact):
        try:
            reader(directory)
        except ValueError as error:
            assert clear(error, directory), (context, reader, error)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "beyond"])
def test_no_value_of_any_key_gives_another_drafter_or_a_raw_error(kind, healthy, tmp_path):
    target, root = healthy
    directory = shutil.copytree(root / kind, tmp_path / "artifact")
    change_settings(recommended_decoding=SUITABLE)(directory)
    expected = load_draft(directory, target)
    config = json.loads((directory / CONFIG).read_text())
    outer = config if kind == "whole" else {}
    changes = [config | {key: value} for key in outer for value in VALUES]
    changes += [{name: config[name] for name in config if name != key} for key in outer]
    for key in config[SETTINGS[0]]:
        inner = [config[SETTINGS[0]] | {key: value} for value in VALUES]
        inner.append({name: value for name, value in config[SETTINGS[0]].items() if name != key})
        changes += [config | dict.fromkeys(SETTINGS, settings) for settings in inner]
    changes += [config | {"rope_parameters": config["rope_parameters"] | {"rope_theta": v}} for v in VALUES]
    for number, changed in enumerate(changes):
        (directory / CONFIG).write_text(json.dumps(changed))
        different = [key for key in config if changed.get(key, "absent") != config[key]]
        outcomes(directory, target, expected, different)
        if number % 10 == 0:  # slower
            faults = [fault for check in verify(directory, root / "target", max_new_tokens=2) for fault in check.faults]
            assert all(isinstance(fault, str) for fault in faults)


FILES = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "its first bytes": lambda file: file.write_bytes(file.read_bytes()[:5]),
    "cut at the end": lambda file: file.write_bytes(file.read_bytes()[:-3]),
    "zeros": lambda file: file.write_bytes(b"\0" * file.stat().st_size),
    "a directory": lambda file: (file.unlink(), file.mkdir()),
    "a list": lambda file: file.write_text("[1]"),
    "a number": lambda file: file.write_text("7"),
    "a link to nowhere": lambda file: (file.unlink(), file.symlink_to("nowhere")),
}


@pytest.mark.parametrize("how", FILES)
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, INDEX, "a shard"])
def test_no_state_of_a_file_causes_a_raw_error(name, how, healthy, tmp_path):
    target, root = healthy
    kind = "shards" if name in (INDEX, "a shard") else "whole"
    directory = shutil.copytree(root / kind, tmp_path / "artifact")
    file = max(directory.glob("model-*.safetensors")) if name == "a shard" else directory / name
    FILES[how](file)
    with pytest.raises(ValueError) as caught:
        load_draft(directory, target)
    assert clear(caught.value, directory) and (file.name in str(caught.value) or "weights" in str(caught.value))
    outcomes(directory, target, None, how)
    assert [fault for check in verify(directory, root / "target") for fault in check.faults]


@pytest.mark.parametrize("reader", [recommended, read_config, lambda d: load_draft(d, random_target())])
def test_a_directory_without_a_drafter_is_rejected_by_name(reader, healthy, tmp_path):
    for directory in (healthy[1] / "target", tmp_path):
        with pytest.raises(ValueError, match="not an exported drafter"):
            reader(directory)


def test_non_finite_weights_do_not_load(healthy, tmp_path):
    directory = shutil.copytree(healthy[1] / "whole", tmp_path / "artifact")
    change_tensors(lambda tensors: [tensor.fill_(float("nan")) for tensor in tensors.values()])(directory)
    with pytest.raises(UserError, match=r"non-finite values in anchor_bias_mlp.0.bias, .* and 19 more"):
        load_draft(directory, healthy[0])


@pytest.mark.parametrize("key", ["anchor_bias_rank", "chain_rank"])
def test_an_excessive_rank_is_rejected_before_memory_is_allocated(key, healthy, tmp_path):
    directory = shutil.copytree(healthy[1] / "beyond", tmp_path / "artifact")
    change_settings(**{key: 10**12})(directory)
    with pytest.raises(UserError, match=r"config.json.*0.bias: has shape \(\d,\) in .*; expected \(1000000000000,\)"):
        load_draft(directory, healthy[0])


def test_an_export_over_an_older_one_leaves_nothing_of_it(healthy, tmp_path):
    target, root = healthy
    directory = shutil.copytree(root / "shards", tmp_path / "artifact")
    (directory / "README.md").write_text("mine")
    draft = random_draft(target, seed=8)
    export_draft(draft, directory, torch.float32)
    assert same(load_draft(directory, target), draft) and (directory / "README.md").read_text() == "mine"
    names = {file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file()}
    assert names == {CONFIG, WEIGHTS, "README.md", "custom_generate/generate.py"}


def test_an_export_that_fails_leaves_the_older_one(healthy, tmp_path, monkeypatch):
    target, root = healthy
    directory = shutil.copytree(root / "shards", tmp_path / "artifact")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        export_draft(random_draft(target, seed=8), directory, torch.float32)
    assert same(load_draft(directory, target), random_draft(target))
    assert not [file for file in directory.rglob(".*")]


def of_files(directory: Path, healthy):
    [check] = [check for check in verify(directory, healthy[1] / "target", max_new_tokens=2) if check.name == "files"]
    return check


def test_the_code_of_another_version_is_a_warning_and_changed_code_a_fault(healthy, tmp_path):
    directory = shutil.copytree(healthy[1] / "whole", tmp_path / "artifact")
    assert (
        not of_files(directory, healthy).warnings
        and "no model card (README.md)" in of_files(directory, healthy).summary
    )
    (directory / DECODER).write_text("def generate(model): ...\n")
    [fault] = of_files(directory, healthy).faults
    assert fault.startswith(f"{DECODER}: modified after the export")
    for recorded in (
        sha256(directory / DECODER),
        None,
    ):  # of an export by another version, or by one that did not record it
        change_config(custom_generate_sha256=recorded)(directory)
        check = of_files(directory, healthy)
        assert not check.faults and check.warnings[0].startswith(
            f"{DECODER}: from a different version of this project."
        )


def test_files_that_no_export_writes_are_reported(healthy, tmp_path):
    directory = shutil.copytree(healthy[1] / "shards", tmp_path / "artifact")
    for name in (".gitattributes", "README.md", "LICENSE", "acceptance_by_slot.png", "notes.txt"):
        (directory / name).write_text("mine")
    check = of_files(directory, healthy)
    assert check.warnings == ["unexpected files: notes.txt."] and "no model card" not in check.summary


def test_an_export_writes_exactly_the_required_files(healthy, tmp_path):
    for kind in ("whole", "shards"):
        for file in [file for file in (healthy[1] / kind).rglob("*") if file.is_file()]:
            directory = shutil.copytree(healthy[1] / kind, tmp_path / kind / file.name)
            (directory / file.relative_to(healthy[1] / kind)).unlink()
            assert of_files(directory, healthy).faults, file


def test_an_artifact_without_a_fingerprint_is_noted(healthy, tmp_path):
    directory = shutil.copytree(healthy[1] / "whole", tmp_path / "artifact")
    change_config(target_fingerprint=None)(directory)
    check = next(c for c in verify(directory, healthy[1] / "target", max_new_tokens=2) if c.name == "target")
    assert "no fingerprint" in check.summary and not [w for w in check.warnings if "sampled" in w]
    random_target(seed=3).save_pretrained(tmp_path / "other")
    check = next(c for c in verify(healthy[1] / "whole", tmp_path / "other", max_new_tokens=2) if c.name == "target")
    assert "no fingerprint" not in check.summary and any("unrelated weights" in warning for warning in check.warnings)


def content(directory: Path) -> dict[str, tuple[bytes, int]]:
    files = [file for file in directory.rglob("*") if file.is_file()]
    return {str(file): (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


def test_verifying_and_loading_change_nothing(healthy):
    target, root = healthy
    before = content(root)
    list(verify(root / "whole", root / "target", max_new_tokens=2))
    load_draft(root / "shards", target)
    recommended(root / "whole")
    check_artifact(root / "whole")
    assert content(root) == before


def test_a_recommendation_changes_no_other_file_and_can_be_removed(healthy, tmp_path):
    directory = shutil.copytree(healthy[1] / "whole", tmp_path / "artifact")
    before = content(directory)
    recommend(directory, SUITABLE)
    after = content(directory)
    assert after.pop(str(directory / RECOMMENDATION)) and after == before
    assert recommended(directory) == {"parallel_rows": 2, "selection": Selection("off", 0.0), "calibrate": True}
    recommend(directory, None)
    assert content(directory) == before and recommended(directory) == {}


def test_the_recommendation_of_an_earlier_version_is_read_unless_there_is_a_file(healthy, tmp_path):
    directory = shutil.copytree(healthy[1] / "whole", tmp_path / "artifact")
    whole = read_config(directory)[SETTINGS[0]]
    change_settings(recommended_decoding=SUITABLE | {"parallel_rows": 7})(directory)
    assert recommended(directory)["parallel_rows"] == 7 and read_config(directory)[SETTINGS[0]] == whole
    assert EARLIER_RECOMMENDATION in (directory / CONFIG).read_text()
    recommend(directory, SUITABLE)
    assert recommended(directory)["parallel_rows"] == 2


@pytest.mark.parametrize("how", [how for how in FILES if how not in ("missing", "a link to nowhere")])
def test_a_damaged_recommendation_is_named_by_every_reader_and_the_drafter_loads(how, healthy, tmp_path):
    target, root = healthy
    directory = shutil.copytree(root / "whole", tmp_path / "artifact")
    recommend(directory, SUITABLE)
    FILES[how](directory / RECOMMENDATION)
    for reader in (recommended, check_artifact):
        with pytest.raises(UserError, match=f"{directory}: {RECOMMENDATION}"):
            reader(directory)
    assert RECOMMENDATION in next(check for check in verify(directory, root / "target") if check.faults).faults[0]
    assert same(load_draft(directory, target), load_draft(root / "whole", target))
