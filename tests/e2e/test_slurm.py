"""The batch script with stubs of SLURM's commands, and sweeps; scripts/slurm/drill.py uses a real SLURM."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from helpers.forked import forked_command
from helpers.shared import ROOT, command

from train.run_dir.state import read_json
from train.sweep import jobs, summaries, table

SBATCH = ROOT / "scripts" / "slurm" / "train.sbatch"
ONE_NODE = {"SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": "1"}
STEPS = [
    f"stage.{s}.{k}" for s in ("attention_tuning", "bonus_calibration") for k in ("steps=2", "global_batch_size=2")
]
VERY_SHORT = ("+experiment=tiny", *STEPS, "data.max_records=60", "data.validation_records=4")
VERY_SHORT += ("stage.evaluate.num_prompts=1", "stage.evaluate.max_new_tokens=8", "stage.evaluate.speed.num_prompts=0")


def stand_in(folder: Path, name: str, status: int = 0) -> None:
    """Create a command that records its last call and prints $SLURM_SAYS."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    record = f'printf "%s\\n" "$@" "cpus $SRUN_CPUS_PER_TASK" > {folder}/{name}.called'
    file.write_text(f"#!/bin/bash\n{record}\necho $SLURM_SAYS\nexit {status}\n")
    file.chmod(0o755)


def batch(cwd: Path, *arguments: str, status: int = 0, **variables: str) -> tuple[subprocess.CompletedProcess, Path]:
    """Run the script as SLURM would; return the process result and the directory of the stubs."""
    folder = cwd / "bin"
    for name in ("srun", "scontrol", "python"):
        stand_in(folder, name, status if name == "srun" else 0)
    own = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SRUN"))}
    own |= {"PATH": f"{folder}:{own['PATH']}", "SLURM_SUBMIT_DIR": str(cwd), **ONE_NODE, **variables}
    done = subprocess.run(["bash", str(SBATCH), *arguments], cwd=cwd, env=own, capture_output=True, text=True)
    return done, folder


def called(folder: Path, name: str) -> list[str]:
    return (folder / f"{name}.called").read_text().splitlines()


def test_one_task_gets_slurms_arguments_and_counts(tmp_path):
    done, folder = batch(tmp_path, "+experiment=tiny", "name=with space", SLURM_RESTART_COUNT="3")
    assert done.returncode == 0, done.stdout + done.stderr
    flags, train = called(folder, "srun")[:3], called(folder, "srun")[3:-1]
    assert flags == ["--ntasks-per-node=1", "--wait=0", "--kill-on-bad-exit=0"]
    assert train[0] == str(folder / "python") and train[1:3] == ["-m", "train"]
    assert train[3:] == ["+experiment=tiny", "name=with space", "trainer.devices=1", "trainer.num_nodes=1"]
    assert "job 42, restart 3: ended with status 0" in done.stdout and not (folder / "scontrol.called").exists()


def test_several_nodes_and_cpus_per_task(tmp_path):
    counts = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "8", "SLURM_NTASKS": "16"}
    done, folder = batch(tmp_path, **counts, SLURM_GPUS_PER_NODE="a100:8", SLURM_CPUS_PER_TASK="6")
    assert done.returncode == 0, done.stdout + done.stderr
    call = called(folder, "srun")
    assert "--ntasks-per-node=8" in call and call[-3:-1] == ["trainer.devices=8", "trainer.num_nodes=2"]
    assert call[-1] == "cpus 6"


@pytest.mark.parametrize("status", [1, 75, 137, 138, 143])
def test_only_a_run_stopped_by_the_signal_is_requeued(status, tmp_path):
    done, folder = batch(tmp_path, status=status)
    assert done.returncode == status
    if status in (75, 138):  # 138: killed by SIGUSR1, before Python could handle it
        assert called(folder, "scontrol")[:2] == ["requeue", "42"]
    else:
        assert f"ended with status {status}" in done.stdout
        assert not (folder / "scontrol.called").exists() or "requeue" not in called(folder, "scontrol")


def test_a_preempted_run_is_requeued(tmp_path):
    done, folder = batch(tmp_path, status=143, SLURM_SAYS="JobState=RUNNING PreemptTime=2026-01-01T00:00:00")
    assert done.returncode == 143 and called(folder, "scontrol")[:2] == ["requeue", "42"]
    done, folder = batch(tmp_path, status=143, SLURM_SAYS="JobState=CANCELLED PreemptTime=None")
    assert done.returncode == 143 and called(folder, "scontrol")[:2] == ["show", "job"]


@pytest.mark.parametrize("counts", [{"SLURM_NTASKS": "2"}, {"SLURM_GPUS_PER_NODE": "8"}])
def test_inconsistent_counts_are_refused(counts, tmp_path):
    done, folder = batch(tmp_path, **counts)
    assert done.returncode == 1 and "--ntasks-per-node=N and --gpus-per-node=N" in done.stdout
    assert not (folder / "srun.called").exists()


def test_the_environment_of_the_checkout_comes_first(tmp_path):
    (tmp_path / "src" / "train").mkdir(parents=True)
    (tmp_path / "src" / "train" / "__main__.py").touch()
    (tmp_path / ".venv").mkdir()
    stand_in(tmp_path / ".venv" / "bin", "python")
    below = tmp_path / "runs"
    below.mkdir()
    done, folder = batch(tmp_path, SLURM_SUBMIT_DIR=str(below))
    assert done.returncode == 0 and called(folder, "srun")[3] == str(tmp_path / ".venv" / "bin" / "python")


def test_signals_to_the_shell_leave_the_tasks_to_decide(tmp_path):
    folder = tmp_path / "bin"
    stand_in(folder, "scontrol")
    (folder / "srun").write_text("#!/bin/bash\nkill -USR1 $PPID; kill -TERM $PPID; sleep 0.2; exit 75\n")
    (folder / "srun").chmod(0o755)
    environment = {**os.environ, **ONE_NODE, "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(SBATCH)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 75 and called(folder, "scontrol")[:2] == ["requeue", "42"]


@pytest.mark.slow
@pytest.mark.parametrize("tasks", ["2", "16"])
def test_tasks_without_a_count_per_node_are_refused(tasks, tmp_path):
    """With --ntasks, SLURM_NTASKS is set but SLURM_NTASKS_PER_NODE is not: the ranks per node are unknown."""
    done, folder = batch(tmp_path, SLURM_NTASKS=tasks)
    assert done.returncode == 1 and "--ntasks-per-node=N" in done.stdout and not (folder / "srun.called").exists()
    here = {"SLURM_NTASKS": tasks, "SLURM_JOB_ID": "42", "SLURM_JOB_NAME": "flexdraft", "SLURM_PROCID": "0"}
    done = command(*VERY_SHORT, cwd=tmp_path, **here)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "--ntasks-per-node" in done.stderr and f"--ntasks={tasks}" in done.stderr
    assert not list(tmp_path.glob("checkpoints/*/*/*"))


@pytest.mark.slow
def test_a_sweep_ends_with_a_table_that_shows_failed_jobs(tmp_path):
    rate = "stage.attention_tuning.module.learning_rate"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "lr_0.001").write_text("a file in the place of the first job's run directory")
    done = command("-m", *VERY_SHORT, f"{rate}=1e-3,2e-3", f"name=lr_${{{rate}}}", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    written = next(tmp_path.glob("multirun/*/table.md"))
    text = written.read_text(encoding="utf-8")
    assert text in done.stdout and str(written) in done.stdout
    header, _, failed, finished = text.splitlines()[:4]
    assert "| learning_rate |" in header and "| 0.001 " in failed and "| failed |" in failed
    assert "job 0 failed: checkpoints/lr_0.001" in text
    report = json.loads((tmp_path / "checkpoints/lr_0.002/evaluate/report.json").read_text())
    decoded = report["benchmarks"]["held_out"]["variants"]
    for name in ("attention_tuned", "calibrated"):
        assert f"| {decoded[name]['tau']:.3f} ({decoded[name]['verify_steps']}) " in finished  # one prompt: no interval
    assert "parallel" not in header  # without a bonus slot, modes differ only in speed
    flops = read_json(tmp_path / "checkpoints/lr_0.002/records/export.done.json")["result"]["block_flops"]
    assert "| MFLOP per block |" in header and f"| {flops / 1e6:.1f} " in finished
    assert "| done " in finished and "checkpoints/lr_0.002" in finished
    assert [job["state"] for job in summaries(written.parent).values()] == ["failed", "done"]


def test_the_table_shows_both_modes_where_they_differ():
    found = {"tau": 3.4351, "low": 3.31, "high": 3.556, "verify_steps": 7124}
    evaluated = {"untuned": found, "calibrated_parallel": found | {"tau": 3.2}, "calibrated": found}
    results = {"export": {"block_flops": 62.7e6}, "evaluate": evaluated}
    job = {"overrides": ["seed=0"], "run_dir": "checkpoints/x", "state": "done", "reason": "", "results": results}
    header, _, row = table({"0": job}).splitlines()
    assert "calibrated_parallel (95%, verify steps)" in header and "attention_tuned" not in header
    assert "| 3.200 (3.31-3.56, 7,124) " in row and "| 3.435 (3.31-3.56, 7,124) " in row and "| 62.7 " in row


WRONG = {
    "one name for all": (["seed=1,2"], ["the same run directory, checkpoints/tiny", "'name=${seed}'"]),
    "the same job twice": (["seed=1,1"], ["checkpoints/tiny", "the same job"]),
    "misspelled key": (["stage.evaluate.num_prompt=1,2"], ["num_prompt", "Did you mean stage.evaluate.num_prompts?"]),
    "wrong type in one job": (["seed=1,two", "name=s${seed}"], ["seed='two'", "expected int"]),
    "unreadable": (["seed=1,,2"], ["seed=1,,2"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", WRONG)
def test_wrong_sweeps_are_refused_before_anything_starts(case, tmp_path):
    overrides, words = WRONG[case]
    done = forked_command("-m", "+experiment=tiny", *overrides, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_sweep_over_several_ranks_needs_a_launcher(tmp_path):
    done = command("-m", "+experiment=tiny", "trainer.devices=2", "seed=1,2", "name=s${seed}", cwd=tmp_path)
    assert done.returncode == 1 and "job 1 failed: trainer.devices=2: a single-process sweep" in done.stdout
    assert "hydra/launcher=submitit_slurm" in done.stdout and not (tmp_path / "checkpoints").exists()


def test_expanded_jobs_match_those_of_hydra():
    assert jobs(["a=1,2", "b=x", "+c.d=choice(3,4)"]) == [
        ["a=1", "b=x", "+c.d=3"],
        ["a=1", "b=x", "+c.d=4"],
        ["a=2", "b=x", "+c.d=3"],
        ["a=2", "b=x", "+c.d=4"],
    ]
    assert jobs(["a=interval(0, 1)"]) == []


def test_the_table_names_a_job_that_was_killed():
    killed = {"overrides": ["a.x=1", "b.x=2", "c.y=1"], "run_dir": "r0", "state": "stopped", "reason": "no end"}
    done = {"overrides": ["a.x=2", "b.x=3", "c.y=4"], "run_dir": "r1", "state": "done", "reason": "", "results": {}}
    text = table({"0": {**killed, "results": {}}, "1": done})
    assert text.splitlines()[0].startswith(
        "| job | a.x | b.x | y | state   |"
    )  # full keys where the short ones are ambiguous
    assert text.endswith("\njob 0 stopped: no end\n")


def test_the_local_cluster_prints_its_usage():
    done = subprocess.run(["bash", str(SBATCH.with_name("local_cluster.sh"))], capture_output=True, text=True)
    assert done.returncode == 2 and "start | stop | clean" in done.stderr
