"""Each run directory has at most one writer, and the lock of a dead writer blocks no other."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from helpers.records import config, finished
from helpers.shared import ROOT

from data.errors import UserError
from train.pipeline import _drop_left_over
from train.run_dir import lock as run_lock
from train.run_dir.lock import FILE, RunLock

HOLD = "import sys, time; from pathlib import Path; from train.run_dir.lock import RunLock\n"
HOLD += "lock = RunLock(Path(sys.argv[1])); lock.acquire()\n"
CHILD = "import os\nif os.fork() == 0:\n    time.sleep(60)\n"


@pytest.fixture
def holder(tmp_path):
    """Start processes that hold the lock of `tmp_path` until the test ends."""
    started = []

    def start(more: str = "") -> subprocess.Popen:
        call = [sys.executable, "-c", f"{HOLD}{more}print('held', flush=True); time.sleep(60)", str(tmp_path)]
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
        started.append(
            subprocess.Popen(call, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
        )
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def written(directory, **changes):
    """Write a lock file as another process would."""
    who = {"host": "elsewhere", "boot": "1", "pid": 7, "started": "1/1", "since": "then", "job": None}
    (directory / FILE).write_text(json.dumps(who | changes))


def test_a_second_writer_is_refused_with_the_owner_and_its_start_time(tmp_path, holder):
    first = holder()
    with pytest.raises(UserError, match=f"process {first.pid} on {run_lock._host()}, since 20.* UTC"):
        RunLock(tmp_path).acquire()
    assert (tmp_path / FILE).exists()  # a refusal deletes nothing


@pytest.mark.parametrize("more", ["", CHILD], ids=["alone", "with a child that lives on"])
def test_the_lock_is_free_after_kill_9(tmp_path, holder, more):
    first = holder(more)
    first.kill()
    first.wait()
    begun = time.monotonic()
    lock = RunLock(tmp_path)
    lock.acquire()
    assert time.monotonic() - begun < 5
    lock.release()
    assert not (tmp_path / FILE).exists()


def test_a_writer_on_another_node_holds_the_lock_while_its_heartbeat_lasts(tmp_path):
    written(tmp_path)
    with pytest.raises(UserError, match=r"process 7 on elsewhere, since then.*heartbeat was \d+ s ago.*delete .*rerun"):
        RunLock(tmp_path).acquire()
    silent = time.time() - run_lock.SILENT - 5
    os.utime(tmp_path / FILE, (silent, silent))
    lock = RunLock(tmp_path)
    lock.acquire()
    assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()
    lock.release()


def test_a_requeued_job_takes_over_the_lock_of_its_dead_node_immediately(tmp_path, monkeypatch):
    written(tmp_path, job={"id": "42", "restart": 0})
    monkeypatch.setenv("SLURM_JOB_ID", "43")
    with pytest.raises(UserError, match="SLURM job 42"):
        RunLock(tmp_path).acquire()
    with pytest.raises(UserError, match="SLURM job 42"):
        RunLock(tmp_path).refuse_other_jobs()
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    RunLock(tmp_path).refuse_other_jobs()  # another rank of the same job
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()


def test_without_file_locks_the_process_is_looked_up(tmp_path, monkeypatch, holder):
    def unknown(descriptor, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run_lock.fcntl, "flock", unknown)
    first = holder()
    with pytest.raises(UserError, match=f"process {first.pid} on"):
        RunLock(tmp_path).acquire()
    first.kill()
    first.wait()
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()


def test_an_empty_or_truncated_lock_file_of_a_dead_writer_is_ignored(tmp_path):
    (tmp_path / FILE).write_text('{"host": "else')
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()


def test_checkpoints_of_a_stage_that_another_process_reruns_are_kept(tmp_path, holder, capsys):
    """Another process may have started a rerun since this process found the stage finished."""
    made, _ = finished(tmp_path)
    checkpoints = tmp_path / "attention_tuning" / "checkpoints"
    checkpoints.mkdir()
    first, lock = holder(), RunLock(tmp_path)
    _drop_left_over(config(), "attention_tuning", made, lock)
    assert checkpoints.exists() and f"process {first.pid} on" in capsys.readouterr().out
    first.kill()
    first.wait()
    made.done.rename(tmp_path / "aside")  # restarted in the meantime
    made.begin(restart=True)
    (tmp_path / "attention_tuning" / "draft.safetensors").unlink()
    _drop_left_over(config(), "attention_tuning", made, lock)
    assert checkpoints.exists()
    (tmp_path / "attention_tuning" / "draft.safetensors").write_bytes(b"result")
    (tmp_path / "aside").rename(made.done)
    _drop_left_over(config(), "attention_tuning", made, lock)
    assert not checkpoints.exists()
    lock.release()


def test_a_lock_acquired_after_a_refusal_sends_heartbeats(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT", 0.01)
    first, lock = holder(), RunLock(tmp_path)
    with pytest.raises(UserError):
        lock.acquire()
    first.kill()
    first.wait()
    lock.acquire()
    os.utime(tmp_path / FILE, (0, 0))
    deadline = time.monotonic() + 10
    while not (alive := (tmp_path / FILE).stat().st_mtime > 0) and time.monotonic() < deadline:
        time.sleep(0.02)
    lock.release()
    assert alive
