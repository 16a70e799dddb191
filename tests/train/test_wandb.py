"""W&B offline: one history over all restarts, with the main metrics and no secrets."""

import json
import signal

import pytest
from helpers.shared import SHORT, command, command_stopped_at_checkpoint
from helpers.wandb_file import history, records

from train.evaluate.plots import read_metrics

SECRETS = {"WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567", "HF_TOKEN": "hf_thisisnobodysbusiness"}


@pytest.mark.slow
def test_a_killed_and_resumed_run_is_one_run_with_one_history(tmp_path):
    call = (*SHORT, "logger=wandb")
    environment = {"HOME": str(tmp_path / "home"), "WANDB_MODE": "offline", **SECRETS}
    (tmp_path / "home").mkdir()
    stop = {"cwd": tmp_path, "number": signal.SIGKILL, **environment}
    command_stopped_at_checkpoint(*call, "stage.attention_tuning.checkpoint_every=24", stage="attention_tuning", **stop)
    done = command(*call, "name=short", cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    run_dir = tmp_path / "checkpoints" / "short"
    for stage in ("attention_tuning", "bonus_calibration"):
        identity = json.loads((run_dir / "records" / f"{stage}.begun.json").read_text())["id"]
        files = sorted((run_dir / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb"))
        assert len(files) == (2 if stage == "attention_tuning" else 1)
        rows: dict[int, dict] = {}
        for row in [row for file in files for row in history(file)]:
            here = rows.setdefault(row["trainer/global_step"], {})
            figures = {key: value for key, value in row.items() if key.startswith(("train/", "val/"))}
            assert all(here.get(key, value) == value for key, value in figures.items())  # repeated values agree
            here.update({key: value for key, value in row.items() if not key.startswith("_")})
        logged = read_metrics(run_dir / stage)
        assert rows.keys() == logged.keys()
        assert all(rows[step][key] == value for step in rows for key, value in logged[step].items() if "loss" in key)
        if stage == "attention_tuning":
            assert [step for step in sorted(rows) if "train/loss" in rows[step]] == [10, 20, 30, 40]
            assert {"val/tau_estimate", "val/slot_1", "val/slot_7"} <= rows[40].keys()
            assert {"speed/tokens_per_second", "speed/mfu", "memory/peak_gb"} <= rows[40].keys()
    artifacts = [r for f in (run_dir / "wandb").glob("*/run-*.wandb") for r in records(f) if r.HasField("artifact")]
    assert [a.artifact.type for a in artifacts] == ["drafter"]
    assert {e.path for e in artifacts[0].artifact.manifest.contents} == {
        "config.json",
        "custom_generate/generate.py",
        "model.safetensors",
    }
    written = [f for f in run_dir.rglob("*") if f.is_file()]
    assert not [f for f in written for secret in SECRETS.values() if secret.encode() in f.read_bytes()]
