"""The training command: runs every stage once and resumes after a kill."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.forked import forked_command
from helpers.shared import SHORT, command, command_stopped_at_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from models.export.artifact_io import load_draft
from train.names import VARIANTS

EXPORTED = "export/model.safetensors"


@pytest.mark.slow
def test_one_command_runs_every_stage_and_prints_the_results(trained_run):
    output = (trained_run / "stdout.txt").read_text(encoding="utf-8")
    assert "lossless: 6/6 prompts identical" in output
    for word in ("[4/4] evaluate", "untuned", "attention_tuned", "calibrated", "target alone"):
        assert word in output
    exported = {file.name for file in (trained_run / "export").iterdir()}
    assert {"README.md", "acceptance_by_slot.png", "config.json", "model.safetensors"} <= exported
    for file in ("loss.png", "acceptance_by_slot.png", "export/model.safetensors", "export/config.json"):
        assert (trained_run / file).stat().st_size > 0
    report = json.loads((trained_run / "evaluate" / "report.json").read_text())
    variants = report["benchmarks"]["held_out"]["variants"]
    assert variants["untuned"]["tau"] < variants["attention_tuned"]["tau"]
    for variant in variants.values():
        gained = [a + 1 for steps in variant["accepted"] for a in steps]
        assert variant["tau"] == pytest.approx(sum(gained) / variant["verify_steps"]) and variant["identical"] == 6
        assert variant["low"] <= variant["tau"] <= variant["high"]
    metrics = json.loads((trained_run / "records" / "bonus_calibration.done.json").read_text())["result"]
    assert metrics["trained_parameters"] > 0 and "val/tau_estimate" in metrics


@pytest.mark.slow
def test_finished_stages_are_not_repeated_and_one_can_be_run_alone(trained_run):
    cwd = trained_run.parents[1]
    weights = (trained_run / "attention_tuning" / "draft.safetensors").stat().st_mtime_ns
    again = command(*SHORT, "name=short", cwd=cwd)
    assert again.returncode == 0 and again.stdout.count("already finished") == 4
    assert (trained_run / "attention_tuning" / "draft.safetensors").stat().st_mtime_ns == weights
    alone = command(*SHORT, "name=short", "stages=[evaluate]", "overwrite=true", cwd=cwd)
    assert alone.returncode == 0 and "[1/1] evaluate" in alone.stdout and "lossless: 6/6" in alone.stdout
    assert (trained_run / "attention_tuning" / "draft.safetensors").stat().st_mtime_ns == weights


@pytest.mark.slow
def test_a_link_in_place_of_a_later_result_is_refused_before_the_first_stage(trained_run, tmp_path):
    run_dir = tmp_path / "checkpoints" / "short"
    shutil.copytree(trained_run, run_dir)
    (run_dir / "evaluate").rename(tmp_path / "behind")
    (run_dir / "evaluate").symlink_to(tmp_path / "behind")
    done = forked_command(*SHORT, "name=short", "overwrite=attention_tuning", cwd=tmp_path)
    assert (
        done.returncode == 1 and "short/evaluate is a symbolic link" in done.stderr and "Traceback" not in done.stderr
    )
    assert (run_dir / "records" / "attention_tuning.done.json").exists() and (run_dir / EXPORTED).exists()


@pytest.mark.slow
def test_other_settings_under_the_same_name_are_refused(trained_run):
    call = (*SHORT, "name=short", "stage.attention_tuning.module.learning_rate=0.1")
    done = forked_command(*call, cwd=trained_run.parents[1])
    assert done.returncode != 0 and "stage.module.learning_rate: 0.005 -> 0.1" in done.stderr
    assert "overwrite=true" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_stopped_run_resumes_and_ends_with_the_same_weights(trained_run, tmp_path, number, status):
    call = (*SHORT, "stages=[attention_tuning,bonus_calibration]")
    run_dir = tmp_path / "checkpoints" / "short"
    for stage in ("attention_tuning", "bonus_calibration"):
        stopped = command_stopped_at_checkpoint(*call, cwd=tmp_path, stage=stage, number=number)
        assert stopped.returncode == status and "Traceback" not in stopped.stderr
        assert not (run_dir / "records" / f"{stage}.done.json").exists()
    done = command(*call, "name=short", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    straight = load_file(trained_run / "bonus_calibration" / "draft.safetensors")
    resumed = load_file(run_dir / "bonus_calibration" / "draft.safetensors")
    assert straight.keys() == resumed.keys()
    assert all(straight[name].equal(resumed[name]) for name in straight)


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.6, 1.2, 1.8, 2.4, 3.5])
def test_a_signal_during_startup_stops_the_run_with_its_exit_status(tmp_path, delay):
    """The signal may arrive during any import."""
    call = [sys.executable, "-m", "train", *SHORT, "name=short"]
    process = subprocess.Popen(call, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not catches(process.pid, signal.SIGUSR1):
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75 and "stopped by SIGUSR1" in errors and "Traceback" not in errors


def catches(pid: int, number: int) -> bool:
    """Return whether a process handles a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.partition("SigCgt:")[2].split()[0], 16) >> (number - 1) & 1)


@pytest.mark.slow
def test_a_requeued_job_overwrites_once(tmp_path):
    call = (*SHORT, "stages=[attention_tuning]", "overwrite=true")
    stop = {"cwd": tmp_path, "stage": "attention_tuning", "number": signal.SIGUSR1}
    assert command_stopped_at_checkpoint(*call, **stop).returncode == 75
    done = command(*call, "name=short", cwd=tmp_path, SLURM_RESTART_COUNT="1")
    assert done.returncode == 0 and "resuming from step" in done.stdout, done.stderr


@pytest.mark.slow
def test_a_stage_without_its_input_names_the_stage_to_run(tmp_path):
    done = forked_command(*SHORT, "stages=[bonus_calibration]", cwd=tmp_path)
    assert done.returncode != 0 and "Run stage attention_tuning first" in done.stderr
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_attention_tuning_alone_can_be_exported(trained_run, tmp_path):
    run_dir = tmp_path / "checkpoints" / "short"
    shutil.copytree(trained_run / "attention_tuning", run_dir / "attention_tuning")
    (run_dir / "records").mkdir()
    shutil.copy(trained_run / "records" / "attention_tuning.done.json", run_dir / "records")
    done = command(*SHORT, "name=short", "stages=[export,evaluate]", "stage.evaluate.num_prompts=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = json.loads((run_dir / "export" / "config.json").read_text())["flexdraft_config"]
    assert config["enable_anchor_bias_logits"] is False and config["anchor_bias_rank"] == 0
    report = json.loads((run_dir / "evaluate" / "report.json").read_text())
    assert "calibrated" not in report["benchmarks"]["held_out"]["variants"]


@pytest.mark.slow
def test_a_drafter_beyond_the_paper_from_conversations_to_decoding(tmp_path, tiny_target):
    """One command trains with the full recipe; the export lists its parts and decodes in both modes."""
    shorter = ("stage.attention_tuning.steps=20", "stage.evaluate.num_prompts=3", "stage.evaluate.speed.repeats=1")
    done = command(*SHORT, *shorter, "+recipe=beyond", "model.draft.chain_rank=16", "name=short", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run_dir = tmp_path / "checkpoints" / "short"
    assert "lossless: 3/3 prompts identical" in done.stdout and "calibrated_parallel" in done.stdout
    config = json.loads((run_dir / "export" / "config.json").read_text())["flexdraft_config"]
    assert config["bonus_slot"] is True and config["chain_rank"] == 16
    tuned, exported = (load_file(run_dir / name) for name in ("attention_tuning/draft.safetensors", EXPORTED))
    changed = {name for name in tuned if not tuned[name].equal(exported[name])}
    assert changed == tuned.keys()  # stage 2 trained all of it
    draft = load_draft(run_dir / "export", tiny_target)
    assert float(draft.bonus_slot.weight.detach().abs().max()) > 0 and draft.config.chain_rank == 16
    report = json.loads((run_dir / "evaluate" / "report.json").read_text())
    assert set(report["benchmarks"]["held_out"]["variants"]) == set(VARIANTS)


@pytest.mark.slow
def test_export_refuses_a_calibrator_of_another_attention_tuning(trained_run, tmp_path):
    run_dir = tmp_path / "checkpoints" / "short"
    shutil.copytree(trained_run, run_dir)
    weights = run_dir / "attention_tuning" / "draft.safetensors"
    save_file({name: t + 1 for name, t in load_file(weights).items()}, weights)
    done = command(*SHORT, "name=short", "stages=[export]", "overwrite=true", cwd=tmp_path)
    assert done.returncode != 0 and "was trained from a different version of" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["bonus_calibration", "export", "evaluate"])
def test_no_stage_starts_from_non_finite_weights(stage, trained_run, tmp_path):
    """Imitate an older version: every record is marked as finished."""
    run_dir = tmp_path / "checkpoints" / "short"
    shutil.copytree(trained_run, run_dir)
    file = {"bonus_calibration": "attention_tuning/draft.safetensors", "export": "bonus_calibration/draft.safetensors"}
    weights = run_dir / file.get(stage, "export/model.safetensors")
    tensors = load_file(weights)
    tensors["mask_embedding"][0] = float("inf")
    with safe_open(weights, "pt") as before:
        save_file(tensors, weights, metadata=before.metadata())
    for record in (run_dir / "records").glob("*.done.json"):
        held = json.loads(record.read_text())
        del held["files"]  # result hashes, which older versions did not record
        record.write_text(json.dumps(held))
    done = command(*SHORT, "name=short", f"stages=[{stage}]", f"overwrite={stage}", cwd=tmp_path)
    named = "export" if stage == "evaluate" else weights.name
    said = f"{named}: non-finite values in mask_embedding"
    assert done.returncode == 1 and re.search(said, done.stderr), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_refused_call_deletes_nothing(trained_run, tmp_path):
    run_dir = tmp_path / "checkpoints" / "short"
    shutil.copytree(trained_run, run_dir)
    before = {file: file.read_bytes() for file in run_dir.rglob("*") if file.is_file()}
    call = ("overwrite=attention_tuning", "adapter=lora", "adapter.target_modules=[nope]")
    done = command(*SHORT, "name=short", *call, cwd=tmp_path)
    assert done.returncode == 1 and "adapter.target_modules" in done.stderr and "Traceback" not in done.stderr
    assert {file: file.read_bytes() for file in before if file.exists()} == before
