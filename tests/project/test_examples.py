"""examples/: every command composes, and every script runs on the embedded target."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.shared import ROOT, SHORT, TINY

from data.config.compose import composed
from data.config.validate import check_settings
from models.draft import DraftModel
from models.draft_config import DraftConfig
from models.export.artifact_io import export_draft
from train.sweep import jobs

EXAMPLES = ROOT / "examples"
OWN = (str(TINY / "target"), str(TINY / "conversations.jsonl"), str(TINY / "prompts.jsonl"))
NO_TRAINING = [f"stage.{s}.steps=2" for s in ("attention_tuning", "bonus_calibration")]


def shell(name: str, *arguments: str, cwd: Path, path: str = "") -> subprocess.CompletedProcess:
    """Run a shell script of examples/ with this Python, unless `path` has another."""
    first = os.pathsep.join([path or str(Path(sys.executable).parent), os.environ["PATH"]])
    call = ["bash", str(EXAMPLES / name), *arguments]
    return subprocess.run(call, cwd=cwd, env=os.environ | {"PATH": first}, capture_output=True, text=True)


def calls(name: str, *arguments: str, cwd: Path) -> list[list[str]]:
    """Return the arguments of every `python` call in a shell script, without running them."""
    stand_in = cwd / "bin" / "python"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/bash\nprintf "%s\\0" "$@" >> calls\nprintf "\\n" >> calls\n', encoding="utf-8")
    stand_in.chmod(0o755)
    done = shell(name, *arguments, cwd=cwd, path=str(stand_in.parent))
    assert done.returncode == 0, done.stderr
    return [line.split("\0")[:-1] for line in (cwd / "calls").read_text(encoding="utf-8").splitlines()]


def test_the_readme_names_every_example():
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert [file.name for file in EXAMPLES.iterdir() if file.is_file() and f"[{file.name}]" not in text] == [
        "README.md"
    ]


@pytest.mark.parametrize("experiment", ["+experiment=tiny", "+experiment=qwen3_8b"])
def test_the_settings_for_an_own_target_compose(experiment, tmp_path):
    found = calls("train_your_own.sh", *OWN, experiment, cwd=tmp_path)
    assert [call[1] for call in found] == ["data.report", "train", "train", "models.verify"]
    for _, _, *overrides in found[:3]:
        config = composed(overrides)
        check_settings(config, overrides)
        assert (config.model.target.name, config.data.path, config.data.prompts) == OWN
    assert [call[-1] for call in found[1:3]] == ["plan=true", f"data.prompts={OWN[2]}"]
    assert found[3][2:] == ["checkpoints/mine/export", OWN[0]]


def test_the_sweep_composes_with_a_directory_for_each_run(tmp_path):
    (call,) = calls("sweep.sh", "+experiment=tiny", cwd=tmp_path)
    assert call[:3] == ["-m", "train", "-m"]
    names = set()
    for overrides in jobs(call[3:]):
        config = composed(overrides)
        check_settings(config, overrides)
        names.add(config.name)
    assert len(names) == 4


@pytest.mark.parametrize("name", ["train_your_own.sh", "sweep.sh"])
def test_a_recipe_without_its_arguments_shows_them(name, tmp_path):
    done = shell(name, cwd=tmp_path)
    assert done.returncode == 2 and f"examples/{name}" in done.stdout and "#" not in done.stdout


@pytest.fixture
def drafter(tiny_target, tmp_path) -> str:
    """An exported untrained drafter for the embedded target."""
    draft = DraftModel(tiny_target, DraftConfig(num_layers=3, block_size=4, calibrator_rank=8))
    export_draft(draft, tmp_path / "export", torch.float32)
    return str(tmp_path / "export")


def test_decoding_with_plain_transformers_runs(drafter, monkeypatch, capsys):
    arguments = [OWN[0], drafter, "--max-new-tokens", "12"]
    monkeypatch.setattr(sys, "argv", ["decode", *arguments])
    runpy.run_path(str(EXAMPLES / "decode_with_transformers.py"), run_name="__main__")
    assert "verify steps" in capsys.readouterr().out
    text = (EXAMPLES / "decode_with_transformers.py").read_text(encoding="utf-8")
    assert not re.search(r"^(from|import) (data|models|train)\b", text, re.MULTILINE)


def test_decoding_in_batches_gives_the_outputs_of_the_target_alone(drafter, monkeypatch, capsys):
    arguments = [OWN[0], drafter, "--max-new-tokens", "12", "--count", "3", "--batch-size", "2"]
    monkeypatch.setattr(sys, "argv", ["decode", *arguments])
    runpy.run_path(str(EXAMPLES / "decode_in_batches.py"), run_name="__main__")
    output = capsys.readouterr().out
    assert "identical outputs: 3/3" in output and "target alone" in output


@pytest.mark.slow
def test_an_own_target_is_trained_and_verified(tmp_path):
    short = [setting for setting in SHORT if ".steps=" not in setting and "speed" not in setting]
    more = ("stage.evaluate.speed.num_prompts=0", "model.draft.num_layers=3")
    done = shell("train_your_own.sh", *OWN, *short, *NO_TRAINING, *more, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lossless: 6/6" in done.stdout
