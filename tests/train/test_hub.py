"""Uploading and downloading drafters, against a stand-in for the Hub; every refusal says what to do."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.hub_server import TOKEN, Repository, hub_server
from helpers.shared import ROOT, SHORT, command, random_draft, random_target
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import models.export.artifact_io
from data.errors import UserError
from models.artifact import RECOMMENDATION
from models.export.artifact_io import export_draft, load_draft
from models.export.download import artifact_directory
from models.export.recommendation import recommend, recommended
from train.publish.upload import Destination, push

RANK = 20000  # so large that the weights are more than 10 MB


@pytest.fixture
def hub():
    with hub_server() as server:
        yield server


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """An exported drafter of 13 MB, with a card."""
    directory = tmp_path_factory.mktemp("artifact") / "export"
    export_draft(random_draft(random_target(), rank=RANK), directory, torch.float32)
    (directory / "README.md").write_text('load_draft("path/to/this/directory", target)\n', encoding="utf-8")
    (directory / "notes.txt").write_text("mine", encoding="utf-8")
    return directory


@pytest.fixture
def sharded(artifact, tmp_path, monkeypatch):
    """The same in two files."""
    monkeypatch.setattr(models.export.artifact_io, "MAX_SHARD_BYTES", 9 * 10**6)
    export_draft(random_draft(random_target(), rank=RANK), tmp_path / "export", torch.float32)
    return tmp_path / "export"


def python(hub, home, *arguments, **environment):
    """A process that takes the stand-in for the Hub."""
    variables = os.environ | hub.environment(home) | environment
    call = [sys.executable, *map(str, arguments)]
    return subprocess.run(call, capture_output=True, text=True, timeout=120, env=variables)


def script(hub, home, directory, *options, **environment):
    return python(hub, home, ROOT / "scripts/push_to_hub.py", directory, "owner/drafter", *options, **environment)


@pytest.fixture
def here(hub, monkeypatch, tmp_path):
    """The stand-in is the Hub of this process, too, whose settings were read when huggingface_hub was imported."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return monkeypatch


def drafter(private=True, tag=None, repository="owner/drafter"):
    return Destination(repository, private, tag)


def refused(text, *call):
    with pytest.raises(UserError, match=re.escape(text)):
        push(*call)
    return True


def head(hub, name="owner/drafter"):
    repository = hub.repositories[name]
    return repository.commits[repository.head]


def nothing_published(hub, name="owner/drafter"):
    return name not in hub.repositories or head(hub, name).keys() <= {".gitattributes"}


@pytest.mark.slow
def test_round_trip(hub, artifact, tmp_path):
    done = script(hub, tmp_path, artifact, "--tag", "v1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"pushed to {hub.url}/owner/drafter"
    files = head(hub)
    assert hub.repositories["owner/drafter"].private
    assert hub.repositories["owner/drafter"].tags == {"v1": hub.repositories["owner/drafter"].head}
    assert "notes.txt" not in files
    assert b'load_draft("owner/drafter", target)' in files["README.md"]
    assert len(files["model.safetensors"]) > 10**7

    code = "from models.export.download import artifact_directory as get; print(get('owner/drafter', revision='v1'))"
    got = python(hub, tmp_path / "other", "-c", code)
    assert got.returncode == 0, got.stderr
    for file in ("config.json", "model.safetensors"):
        assert (artifact_directory(got.stdout.strip()) / file).read_bytes() == (artifact / file).read_bytes()
    # What was downloaded once needs no network.
    again = python(hub, tmp_path / "other", "-c", code, HF_HUB_OFFLINE="1")
    assert again.stdout == got.stdout, again.stderr


@pytest.mark.slow
def test_an_interrupted_upload_goes_on(hub, sharded, tmp_path):
    hub.accepted_puts = 1
    broken = script(hub, tmp_path, sharded)
    failed = "error: push to owner/drafter: the Hub is unreachable, or the connection failed."
    message = f"{failed} Error while uploading 'model-0000"
    assert broken.returncode == 1 and message in broken.stderr and "Traceback" not in broken.stderr
    assert "Nothing was published. Rerun the same command to resume the upload." in broken.stderr
    assert nothing_published(hub) and len(hub.objects) == 1

    hub.accepted_puts, hub.calls = None, []
    assert script(hub, tmp_path, sharded).returncode == 0
    assert hub.count("PUT", "/objects/") == 1  # not the one that is there
    weights = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)] + ["model.safetensors.index.json"]
    code = sorted(f"custom_generate/{file.name}" for file in sharded.glob("custom_generate/*.py"))
    assert sorted(head(hub)) == [".gitattributes", "config.json", *code, *weights]


@pytest.mark.slow
def test_a_wrong_token(hub, artifact, tmp_path):
    done = script(hub, tmp_path, artifact, HF_TOKEN="hf_wrong")
    message = "error: push to owner/drafter: the Hub rejected the token. Set a different HF_TOKEN, or run "
    assert done.returncode == 1 and done.stderr == message + "`hf auth login`. Nothing was uploaded.\n"
    assert not hub.repositories


@pytest.mark.slow
def test_no_network(hub, artifact, tmp_path):
    done = script(hub, tmp_path, artifact, HF_ENDPOINT="http://127.0.0.1:9")
    failed = "error: push to owner/drafter: the Hub is unreachable, or the connection failed."
    message = f"{failed} [Errno 111] Connection refused "
    assert done.returncode == 1 and done.stderr == message + "Nothing was uploaded.\n"


def test_a_drafter_is_loaded_by_name(hub, here, artifact):
    push(artifact, drafter())
    target = random_target()
    expected = random_draft(target, rank=RANK).own_parameters()
    loaded = load_draft("owner/drafter", target).own_parameters()
    assert loaded.keys() == expected.keys() and all(p.equal(expected[name]) for name, p in loaded.items())


def test_a_connection_that_breaks_publishes_nothing(hub, here, artifact):
    hub.drop = "/commit/"
    assert refused("the Hub is unreachable, or the connection failed. Server disconnected", artifact, drafter())
    assert nothing_published(hub)

    hub.drop, hub.calls = None, []
    push(artifact, drafter())
    assert hub.count("PUT", "/objects/") == 0  # all was there


def test_a_tag_that_did_not_get_through(hub, here, artifact):
    hub.drop = "/tag/"
    assert refused("but not tagged. Rerun the same command to tag it.", artifact, drafter(tag="v1"))
    hub.drop, commit = None, hub.repositories["owner/drafter"].head
    push(artifact, drafter(tag="v1"))
    assert hub.repositories["owner/drafter"].tags == {"v1": commit}  # the same: nothing had changed


def test_a_new_drafter_takes_the_place_of_the_old(hub, here, artifact, sharded):
    push(artifact, drafter())
    head(hub)["theirs.md"] = b"kept"
    push(sharded, drafter())
    assert "model.safetensors" not in head(hub) and "model.safetensors.index.json" in head(hub)
    assert {"README.md", "theirs.md"} <= head(hub).keys()


def test_a_recommendation_is_sent_and_a_stale_one_is_deleted(hub, here, artifact, tmp_path):
    directory = shutil.copytree(artifact, tmp_path / "evaluated")
    recommend(directory, {"parallel_rows": 2, "selection": "off", "threshold": 0.0, "calibrate": True})
    push(directory, drafter())
    assert head(hub)[RECOMMENDATION] == (directory / RECOMMENDATION).read_bytes()
    assert recommended("owner/drafter")["parallel_rows"] == 2
    push(artifact, drafter())
    assert RECOMMENDATION not in head(hub)
    (directory / RECOMMENDATION).write_text("{")
    assert refused(f"{RECOMMENDATION}: invalid JSON", directory, drafter())


def test_no_token(hub, here, artifact):
    here.delenv("HF_TOKEN")
    here.setattr(constants, "HF_TOKEN_PATH", str(artifact / "none"))
    assert refused("not logged in to the Hub. Set HF_TOKEN, or run `hf auth login`.", artifact, drafter())
    assert not hub.calls


def test_a_token_that_may_only_read(hub, here, artifact):
    hub.role = "read"
    assert refused("the token is read-only. Create a token with write access", artifact, drafter())
    assert not hub.repositories


def test_another_owner(hub, here, artifact):
    text = (
        "push to else/drafter: your account can write only to repositories owned by owner or team. "
        "Choose one of those owners."
    )
    assert refused(text, artifact, drafter(repository="else/drafter"))
    push(artifact, drafter(repository="team/drafter"))
    assert "config.json" in head(hub, "team/drafter")


def test_offline(hub, here, artifact):
    here.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refused("HF_HUB_OFFLINE is set. Unset it, or push from a machine with network access.", artifact, drafter())


@pytest.mark.parametrize("name", ["drafter", "a/b/c", "owner/dra fter", "owner/", 3])
def test_no_name_of_a_repository(hub, here, artifact, name):
    assert refused(f"push to {name!r}: expected a Hub repository name", artifact, drafter(repository=name))


@pytest.mark.parametrize("tag", ["a b", "", "-v1", 1.0])
def test_no_name_of_a_tag(hub, here, artifact, tag):
    assert refused(f"tag {tag!r}: expected letters, digits", artifact, drafter(tag=tag))


def test_a_tag_that_is_there(hub, here, artifact, sharded):
    push(artifact, drafter(tag="v1"))
    before = hub.repositories["owner/drafter"].head
    assert refused("owner/drafter already has a tag v1. Choose a different one.", sharded, drafter(tag="v1"))
    assert hub.repositories["owner/drafter"].head == before


@pytest.mark.parametrize(
    "files, text",
    [
        ({"config.json": b'{"model_type": "qwen3"}', "model.safetensors": b"x"}, "contains something other than a"),
        ({"pytorch_model.bin": b"x"}, "contains something other than a FlexDraft drafter"),
        ({"config.json": b"{"}, "contains something other than a FlexDraft drafter"),
        (
            {"config.json": b'{"flexdraft_config": {}, "model_type": "llama"}'},
            "already holds a drafter for a different target: model_type=llama, but this one has qwen3",
        ),
    ],
)
def test_what_a_repository_holds_stays(hub, here, artifact, files, text):
    hub.repositories["owner/drafter"] = Repository(private=True, commits={"a" * 40: files})
    assert refused(f"owner/drafter {text}", artifact, drafter())
    assert head(hub) == files and not hub.objects


def test_a_public_repository_is_no_private_one(hub, here, artifact):
    hub.repositories["owner/drafter"] = Repository(private=False)
    assert refused("owner/drafter already exists and is public, not private. Push as public", artifact, drafter())
    push(artifact, drafter(private=False))


def not_finite(directory):
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {"mask_embedding": tensors["mask_embedding"] * torch.nan}, directory / "model.safetensors")


def missing(directory):
    tensors = load_file(directory / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "layers.1" not in k}, directory / "model.safetensors")


def without_extras(directory):
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config["flexdraft_config"] |= {"bonus_slot": True, "chain_rank": 4}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")


def cut(directory):
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data[:-1000])


def no_drafter(directory):
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen3"}), encoding="utf-8")


@pytest.mark.parametrize(
    "damage, text",
    [
        (not_finite, "mask_embedding: 32 of 32 values are not finite"),
        (missing, "Missing tensors: layers.1.self_attn.o_proj.weight. Export it again."),
        (without_extras, "Missing tensors: bonus_slot.weight, chain_mlp.0.bias, chain_mlp.0.weight, chain_mlp.2.b"),
        (cut, "the drafter is incomplete. model.safetensors: "),
        (no_drafter, "not an exported drafter"),
    ],
)
def test_a_damaged_drafter_is_not_sent(hub, here, artifact, tmp_path, damage, text):
    shutil.copytree(artifact, tmp_path / "export")
    damage(tmp_path / "export")
    assert refused(text, tmp_path / "export", drafter()) and not hub.calls


@pytest.mark.slow
def test_a_run_pushes_at_its_end_and_repeats_nothing(hub, trained_run, tmp_path):
    shutil.copytree(trained_run, tmp_path / "checkpoints" / "short")
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    call = {"cwd": tmp_path, **hub.environment(tmp_path / "hf")}
    done = command(*SHORT, "name=short", "export.push_to_hub=owner/drafter", "export.tag=v1", **call)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("already finished") == 4 and f"pushed to {hub.url}/owner/drafter" in done.stdout
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")} == before
    card = head(hub)["README.md"].decode()
    assert "| held_out | calibrated |" in card and 'custom_generate="owner/drafter"' in card
    assert "push_to_hub" not in card and head(hub)["acceptance_by_slot.png"].startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting, environment, text",
    [
        ("export.push_to_hub=drafter", {}, "push to 'drafter': expected a Hub repository name (owner/name)"),
        ("export.push_to_hub=owner/drafter", {"HF_TOKEN": "hf_wrong"}, "the Hub rejected the token"),
        ("stages=[attention_tuning]", {}, "does not export a drafter. Add export to stages"),
    ],
)
def test_a_run_is_refused_before_it_trains(hub, tmp_path, setting, environment, text):
    settings = (*SHORT, "name=short", "export.push_to_hub=owner/drafter", setting)
    done = command(*settings, cwd=tmp_path, **(hub.environment(tmp_path / "hf") | environment))
    assert done.returncode == 1 and done.stderr.startswith("error: ") and text in done.stderr, done.stderr
    assert not (tmp_path / "checkpoints").exists()


def test_nothing_to_download(hub, here, tmp_path):
    cases = {
        "owner/none": "neither a local directory nor a Hub repository that you have access to",
        str(tmp_path / "none"): "no such directory, and not a Hub repository name",
        "none": "no such directory, and not a Hub repository name",
    }
    for source, text in cases.items():
        with pytest.raises(ValueError, match=re.escape(f"{source}: {text}")):
            artifact_directory(source)
    hub.url = "http://127.0.0.1:9"
    here.setattr(constants, "ENDPOINT", hub.url)
    with pytest.raises(ValueError, match="not in the local cache, and the Hub is unreachable"):
        artifact_directory("owner/none")


def test_a_revision_that_is_not_there(hub, here, artifact):
    push(artifact, drafter())
    with pytest.raises(ValueError, match="owner/drafter: revision v7 does not exist in this repository"):
        artifact_directory("owner/drafter", revision="v7")
    with pytest.raises(ValueError, match="is a local directory; revision=v7"):
        artifact_directory(artifact, revision="v7")
