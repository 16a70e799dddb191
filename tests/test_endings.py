"""A loop that ends is not a stage that is done: what others end goes on with the same command."""

import pytest
from conftest import SHORT, command
from faults import StopAt
from lightning.pytorch.callbacks import EarlyStopping, Timer
from test_checkpoints import STEPS, run

from train.checkpoints import step_of, usable_checkpoint
from train.endings import Diverged, NotFinished


def same(left, right) -> bool:
    return all(p.equal(right.trained()[name]) for name, p in left.trained().items())


@pytest.mark.parametrize(("passes", "number"), [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("step", [3, 4])
def test_a_run_that_a_callback_ends_goes_on_as_if_it_had_not_been(step, passes, number, tmp_path):
    """Also in the middle of a step, and after a validation."""
    straight, kept, history = run(tmp_path / "straight", passes=passes)
    directory = tmp_path / "attention_tuning" / "checkpoints"
    with pytest.raises(NotFinished, match=f"attention_tuning ended at step {step} of {STEPS}, by a callback") as ended:
        run(directory, passes=passes, faults=[StopAt(step, number)])
    assert ended.value.status == 75 and step_of(usable_checkpoint(directory)) == step
    training, keeper, after = run(directory, passes=passes)
    assert after.validations == [s for s in history.validations if s > step] and keeper.best == kept.best
    assert same(straight, training)


def test_a_time_limit_holds_for_each_start(tmp_path):
    straight, kept, _ = run(tmp_path / "straight")
    for step in range(1, STEPS):
        with pytest.raises(NotFinished, match=f"ended at step {step} of {STEPS}, by trainer.max_time"):
            run(tmp_path / "limited", faults=[Timer({"microseconds": 1})])
    training, keeper, _ = run(tmp_path / "limited", faults=[Timer({"microseconds": 1})])
    assert keeper.best == kept.best and same(straight, training)


def test_early_stopping_of_lightning_does_not_finish_a_stage(tmp_path):
    stop = EarlyStopping("val/loss", min_delta=100.0, patience=1)
    with pytest.raises(NotFinished, match="use stage..*patience"):
        run(tmp_path, faults=[stop])


def test_only_the_first_rank_reports(capsys, monkeypatch):
    for kind, status, said in ((NotFinished, 75, "why\n"), (Diverged, 1, "error: why\n")):
        for rank in ("0", "1"):
            monkeypatch.setenv("RANK", rank)
            with pytest.raises(SystemExit) as left:
                kind("why").leave()
            assert left.value.code == (0 if rank == "1" else status)
            assert capsys.readouterr().err == ("" if rank == "1" else said)


def test_the_command_says_that_a_stage_is_not_finished_and_goes_on_until_it_is(tmp_path):
    call = (*SHORT, "stages=[attention_tuning]", "stage.attention_tuning.steps=2", "name=short")
    done = command(*call, "+trainer.max_time=00:00:00:00", cwd=tmp_path)
    records = tmp_path / "checkpoints" / "short" / "records"
    assert done.returncode == 75 and not (records / "attention_tuning.done.json").exists()
    assert [line for line in done.stderr.splitlines() if "not finished" in line and "same command goes on" in line]
    assert "Traceback" not in done.stderr
    done = command(*call, cwd=tmp_path)
    assert done.returncode == 0 and (records / "attention_tuning.done.json").exists()
