"""Checkpoints: written atomically, verified when read, and sufficient to resume identically."""

import os
import random
import resource
import signal
import stat

import numpy as np
import pytest
import torch
from helpers.runs import STEPS, run
from helpers.shared import random_target
from helpers.training import module
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from data.errors import UserError
from train.checkpoint.files import CheckpointFiles, usable_checkpoint
from train.checkpoint.rng_state import random_state, set_random_state
from train.loop.modules import AttentionTuning
from train.run_dir.checkpoint_names import checkpoints_in, step_of
from train.run_dir.state import publish


def save(directory, step: int) -> None:
    CheckpointFiles().save_checkpoint({"step": step, "weights": torch.randn(50)}, directory / f"step-{step:08d}.ckpt")


@settings(max_examples=40, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_is_used(tmp_path_factory, place, bit, cut):
    directory = tmp_path_factory.mktemp("damaged")
    for step in (10, 20):
        save(directory, step)
    newest = usable_checkpoint(directory)
    assert step_of(newest) == 20
    content = bytearray(newest.read_bytes())
    at = int(place * len(content))
    content[at] ^= 1 << bit
    newest.write_bytes(content[:at] if cut else content)
    said = []
    assert step_of(usable_checkpoint(directory, said.append)) == 10
    assert len(said) == 1 and newest.name in said[0] and "damaged" in said[0]


def test_an_interrupted_write_leaves_the_previous_file(tmp_path, monkeypatch):
    save(tmp_path, 10)

    def half(value, path):
        path.write_bytes(b"half a checkpoint")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 20)
    assert step_of(usable_checkpoint(tmp_path)) == 10 and len(list(tmp_path.glob("step-*"))) == 1


def test_a_checkpoint_that_runs_code_is_refused(tmp_path):
    torch.save({"weights": random.Random(0)}, tmp_path / "step-00000010.ckpt")
    with pytest.raises(Exception, match="(?i)weights.only"):
        CheckpointFiles().load_checkpoint(tmp_path / "step-00000010.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_run_stopped_at_any_step_resumes_as_if_uninterrupted(tmp_path, monkeypatch, micro_batches):
    straight, kept, history = run(tmp_path / "straight", micro_batches=micro_batches)
    assert list(history.losses) == list(range(1, STEPS + 1)) and history.validations == [2, 4, 6, 8]
    for step in range(1, STEPS + 1):
        directory = tmp_path / f"stopped{step}"
        with pytest.raises(SystemExit) as stopped:
            run(directory, stop_at=step, monkeypatch=monkeypatch, micro_batches=micro_batches)
        assert stopped.value.code == 75
        training, checkpointer, after = run(directory, micro_batches=micro_batches)
        assert after.losses == {s: loss for s, loss in history.losses.items() if s > step}
        assert after.validations == [s for s in history.validations if s > step]
        assert after.drawn == {s: drawn for s, drawn in history.drawn.items() if s > step}  # generators resume as well
        assert checkpointer.best == kept.best and checkpointer.figures() == kept.figures()
        assert all(t.equal(checkpointer.best_weights()[n]) for n, t in kept.best_weights().items())
        assert all(p.equal(training.trained()[n]) for n, p in straight.trained().items())


@pytest.mark.slow
def test_the_last_step_is_always_validated(tmp_path, monkeypatch):
    straight, kept, history = run(tmp_path / "straight", validate_every=3)
    assert history.validations == [3, 6, 8] and list(history.losses) == list(range(1, STEPS + 1))
    for step in (7, 8):
        with pytest.raises(SystemExit):
            run(tmp_path / str(step), stop_at=step, monkeypatch=monkeypatch, validate_every=3)
        training, checkpointer, rest = run(tmp_path / str(step), validate_every=3)
        assert rest.validations == [s for s in (8,) if s > step] and checkpointer.best == kept.best
        assert all(p.equal(training.trained()[n]) for n, p in straight.trained().items())


@pytest.mark.slow
def test_the_latest_checkpoints_and_the_best_weights_are_kept(tmp_path):
    training, checkpointer, _ = run(tmp_path)
    assert [step_of(f) for f in sorted(tmp_path.glob("step-*"))] == [6, 8]  # every third and the last
    best = checkpointer.best["step"]
    assert best in [step_of(f) for f in tmp_path.glob("best-*")]
    known = [step for step in checkpointer.best_of.values() if step]
    assert all(step_of(f) >= min(known, default=0) for f in tmp_path.glob("best-*"))
    if best == STEPS:
        assert all(p.equal(checkpointer.best_weights()[n]) for n, p in training.trained().items())


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (2, 4)])
@pytest.mark.parametrize("step", [3, 4])
def test_the_number_of_micro_batches_may_change_on_resume(tmp_path, monkeypatch, before, after, step):
    """The number changes with `micro_batch_size` or the ranks; validations, checkpoints and the last step do not."""
    straight, kept, history = run(tmp_path / "straight")
    with pytest.raises(SystemExit):
        run(tmp_path / "stopped", stop_at=step, monkeypatch=monkeypatch, micro_batches=before)
    training, checkpointer, rest = run(tmp_path / "stopped", micro_batches=after)
    assert list(rest.losses) == list(range(step + 1, STEPS + 1))
    assert rest.validations == [s for s in history.validations if s > step]
    assert checkpointer.best["step"] == kept.best["step"]
    assert all(rest.losses[s] == pytest.approx(history.losses[s], rel=1e-4) for s in rest.losses)
    assert step_of(usable_checkpoint(tmp_path / "stopped")) == STEPS


def test_without_intact_best_weights_the_newest_checkpoint_is_used(tmp_path, monkeypatch):
    with pytest.raises(SystemExit):
        run(tmp_path, stop_at=7, monkeypatch=monkeypatch)
    for path in tmp_path.glob("best-*"):
        path.unlink()
    said = []
    assert step_of(usable_checkpoint(tmp_path, said.append)) == 7 and "no intact best weights" in said[-1]
    _, checkpointer, history = run(tmp_path)
    assert list(history.losses) == [8] and checkpointer.best["step"] == 8
    for path in tmp_path.glob("step-*"):
        path.write_bytes(b"")
    said.clear()
    assert usable_checkpoint(tmp_path, said.append) is None and "restarting the stage" in said[-1]


@pytest.mark.slow
def test_damaged_best_weights_are_recreated(tmp_path, monkeypatch):
    straight, kept, _ = run(tmp_path / "straight")
    with pytest.raises(SystemExit):
        run(tmp_path / "stopped", stop_at=7, monkeypatch=monkeypatch, keep=3)  # checkpoints of the steps 3, 6 and 7
    newest = max((tmp_path / "stopped").glob("best-*"))
    assert step_of(newest) == 6
    newest.write_bytes(newest.read_bytes()[:-1])
    said = []
    assert step_of(usable_checkpoint(tmp_path / "stopped", said.append)) == 3 and newest.name in said[0]
    training, checkpointer, _ = run(tmp_path / "stopped")
    assert checkpointer.best == kept.best
    assert all(p.equal(training.trained()[n]) for n, p in straight.trained().items())


@pytest.mark.slow
def test_micro_batches_are_weighted_by_tokens(tmp_path):
    whole, _, one = run(tmp_path / "one")
    parts, _, four = run(tmp_path / "four", micro_batches=4)
    for step, loss in one.losses.items():
        assert four.losses[step] == pytest.approx(loss, rel=1e-4)
    moved = max(
        (p - module(AttentionTuning, random_target()).trained()[n]).abs().max() for n, p in whole.trained().items()
    )
    apart = max((p - parts.trained()[n]).abs().max() for n, p in whole.trained().items())
    assert apart < 2e-3 * moved


def test_random_generators_resume_their_state():
    state = random_state()
    first = (random.random(), np.random.random(), torch.rand(3).tolist())
    set_random_state(state)
    assert first == (random.random(), np.random.random(), torch.rand(3).tolist())
    set_random_state({"ranks": state["ranks"] * 2})  # saved by two ranks: nothing to restore on one
    assert first != (random.random(), np.random.random(), torch.rand(3).tolist())


def test_a_checkpoint_of_another_run_is_reported_and_not_used(tmp_path):
    for step, run_of in ((10, "mine"), (20, "theirs")):
        state = {"callbacks": {"Checkpoints": {"best": {}, "run": run_of}}}
        CheckpointFiles().save_checkpoint(state, tmp_path / f"step-{step:08d}.ckpt")
    said = []
    assert step_of(usable_checkpoint(tmp_path, said.append, "mine")) == 10
    assert len(said) == 1 and "step-00000020" in said[0] and "theirs" in said[0]
    assert usable_checkpoint(tmp_path, said.append, "new") is None


def test_a_full_disk_is_reported_with_path_and_sizes_and_older_checkpoints_stay(tmp_path):
    save(tmp_path, 10)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:  # torch hides the system error and reports an unexpected position
        with pytest.raises(UserError) as refused:
            state = {"weights": torch.randn(10**6)}
            CheckpointFiles().save_checkpoint(state, tmp_path / "step-00000020.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    text = str(refused.value)
    assert str(tmp_path / "step-00000020.ckpt") in text and "4.0 MB needed" in text and "free" in text
    assert "unexpected pos" not in text and "exceeds the size limit" in text
    assert [path.name[:13] for path in tmp_path.iterdir()] == ["step-00000010"]  # no partial file


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_get_the_mode_of_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        publish(tmp_path / "draft.safetensors", lambda path: save_file({"a": torch.zeros(3)}, path))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "draft.safetensors").stat().st_mode) == mode


def test_user_files_next_to_the_checkpoints_are_ignored(tmp_path):
    names = ["step-mine.ckpt", "step-00000004-.ckpt", "best-mine.safetensors", f"step-00000004-{'a' * 16}.ckpt"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in checkpoints_in(tmp_path)] == names[-1:]
    assert (
        usable_checkpoint(tmp_path, lambda text: None) is None
    )  # the damaged file is skipped, the others cause no error
