"""A loop stopped early does not finish its stage; the same command resumes it."""

import pytest
from helpers.faults import StopAt
from helpers.runs import STEPS, run
from helpers.shared import SHORT, command
from lightning.pytorch.callbacks import Callback, Timer

from train.checkpoint.files import usable_checkpoint
from train.endings.agreed import AgreedEnd, Diverged, NotFinished
from train.run_dir.checkpoint_names import step_of


def same(left, right) -> bool:
    return all(p.equal(right.trained()[name]) for name, p in left.trained().items())


@pytest.mark.slow
@pytest.mark.parametrize(("micro_batches", "number"), [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("step", [3, 4])
def test_a_run_stopped_by_a_callback_resumes_identically(step, micro_batches, number, tmp_path):
    """Covers stops in the middle of a step and after a validation."""
    straight, kept, history = run(tmp_path / "straight", micro_batches=micro_batches)
    directory = tmp_path / "attention_tuning" / "checkpoints"
    with pytest.raises(
        NotFinished, match=f"attention_tuning is not finished: stopped at step {step} of {STEPS} because of a callback"
    ) as ended:
        run(directory, micro_batches=micro_batches, faults=[StopAt(step, number)])
    assert ended.value.status == 75 and step_of(usable_checkpoint(directory)) == step
    training, checkpointer, after = run(directory, micro_batches=micro_batches)
    assert after.validations == [s for s in history.validations if s > step] and checkpointer.best == kept.best
    assert same(straight, training)


@pytest.mark.slow
def test_a_time_limit_applies_to_each_start(tmp_path):
    straight, kept, _ = run(tmp_path / "straight")
    for step in range(1, STEPS):
        with pytest.raises(NotFinished, match=f"stopped at step {step} of {STEPS} because of trainer.max_time"):
            run(tmp_path / "limited", faults=[Timer({"microseconds": 1})])
    training, checkpointer, _ = run(tmp_path / "limited", faults=[Timer({"microseconds": 1})])
    assert checkpointer.best == kept.best and same(straight, training)


class StopAfterValidation(Callback):
    """User-written early stopping on a validation metric."""

    def on_validation_end(self, trainer, pl_module):
        trainer.should_stop = trainer.should_stop or float(trainer.callback_metrics["val/loss"]) > 0


def test_a_callback_that_stops_on_a_metric_does_not_finish_a_stage(tmp_path):
    with pytest.raises(NotFinished, match="set stage..*patience"):
        run(tmp_path, faults=[StopAfterValidation()])


class StopBefore(Callback):
    """Stop the loop before this process completes a step."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self.stop)

    def stop(self, trainer, *_):
        trainer.should_stop = True


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_batch_start"])
def test_a_run_without_a_step_is_not_requeued(hook, tmp_path):
    """Exit status 75 would requeue the job forever."""
    directory = tmp_path / "attention_tuning" / "checkpoints"
    with pytest.raises(NotFinished):
        run(directory, micro_batches=2, faults=[StopAt(3)])
    for _ in range(2):
        ended = end_of(directory, StopBefore(hook))
        assert ended.status == 1 and "No step was completed after startup" in str(ended)
        assert "stopped at step 3" in str(ended) and step_of(usable_checkpoint(directory)) == 3


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_time_limit_below_one_step_is_an_error_and_not_a_requeue_loop(micro_batches, tmp_path):
    """The limit is checked after each micro-batch, and half a step does not count."""
    directory = tmp_path / "attention_tuning" / "checkpoints"
    ended = [end_of(directory, Timer({"microseconds": 1}), micro_batches=micro_batches) for _ in range(3)]
    if micro_batches == 1:
        assert [e.status for e in ended] == [75] * 3 and "step 3" in str(ended[-1])
    else:
        assert {e.status for e in ended} == {1}
        assert "step 0 of" in str(ended[-1]) and "more time than one step takes" in str(ended[-1])


def end_of(directory, callback, micro_batches=2) -> AgreedEnd:
    with pytest.raises(AgreedEnd) as ended:
        run(directory, micro_batches=micro_batches, faults=[callback])
    return ended.value


def test_only_the_first_rank_reports(capsys, monkeypatch):
    for kind, status, said in ((NotFinished, 75, "why\n"), (Diverged, 1, "error: why\n")):
        for rank in ("0", "1"):
            monkeypatch.setenv("RANK", rank)
            with pytest.raises(SystemExit) as left:
                kind("why").leave()
            assert left.value.code == (0 if rank == "1" else status)
            assert capsys.readouterr().err == ("" if rank == "1" else said)


@pytest.mark.slow
def test_the_command_reports_an_unfinished_stage_and_resumes_until_it_is_finished(tmp_path):
    call = (*SHORT, "stages=[attention_tuning]", "stage.attention_tuning.steps=2", "name=short")
    records = tmp_path / "checkpoints" / "short" / "records"
    refused = command(*call, "+trainer.max_time=00:00:00:00", cwd=tmp_path)
    assert refused.returncode == 1 and "error: trainer.max_time" in refused.stderr and not records.exists()
    limit = "+trainer.max_time={_target_: datetime.timedelta, microseconds: 1}"
    done = command(*call, limit, cwd=tmp_path)
    assert done.returncode == 75 and not (records / "attention_tuning.done.json").exists()
    assert [
        line for line in done.stderr.splitlines() if "not finished" in line and "Rerun the command to resume" in line
    ]
    assert "Traceback" not in done.stderr
    done = command(*call, cwd=tmp_path)
    assert done.returncode == 0 and (records / "attention_tuning.done.json").exists()
