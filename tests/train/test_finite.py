"""Non-finite steps are skipped and counted; non-finite weights are never saved."""

import math
from itertools import product

import pytest
import torch
from helpers.faults import OVERFLOW, BadGradient, BadLoss, BadValidation, BadWeight
from helpers.runs import STEPS, run
from helpers.shared import random_target
from helpers.training import module
from lightning.pytorch.callbacks import Callback

from train.checkpoint.checkpoints import check_final_weights
from train.checkpoint.files import CheckpointFiles, usable_checkpoint
from train.endings.agreed import Diverged
from train.endings.finite import LARGEST_NORM, not_finite, step_metrics
from train.loop.modules import AttentionTuning, BonusCalibration
from train.run_dir.checkpoint_names import step_of

FAULTS = {
    "a loss of NaN": (BadLoss, math.nan),
    "an infinite loss": (BadLoss, math.inf),
    "a gradient of NaN": (BadGradient, math.nan),
    "an infinite gradient": (BadGradient, -math.inf),
    "a norm that overflows": (BadGradient, OVERFLOW),
}


class Snapshots(Callback):
    """Record weights and optimizer state after every step."""

    def __init__(self) -> None:
        self.after = {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        state = [v for s in trainer.optimizers[0].state.values() for v in s.values()]
        weights = list(pl_module.trained().values())
        self.after[trainer.global_step] = [t.detach().clone() for t in [*weights, *state]]


def same(left, right) -> bool:
    return len(left) == len(right) and all(a.equal(b) for a, b in zip(left, right, strict=True))


@pytest.mark.slow(but="a loss of NaN-AttentionTuning")
@pytest.mark.parametrize("stage", [AttentionTuning, BonusCalibration])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_non_finite_step_changes_neither_weights_nor_optimizer_state(fault, stage, tmp_path, capsys):
    kind, value = FAULTS[fault]
    snapshots = Snapshots()
    run(tmp_path, faults=[kind({0, 3}, value), snapshots], stage=stage)
    after = snapshots.after
    assert same(after[1], list(module(stage, random_target()).trained().values()))  # no optimizer state either
    assert same(after[3], after[4])
    for step in set(range(2, STEPS + 1)) - {4}:
        assert not same(after[step - 1], after[step]), step
    said = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert [line.split()[1] for line in said] == ["1:", "4:"] and all("is not finite (1 in a row" in s for s in said)


@pytest.mark.parametrize("number", [0, 1])
def test_one_non_finite_micro_batch_skips_the_entire_step(number, tmp_path):
    snapshots = Snapshots()
    run(tmp_path, faults=[BadLoss({2}, number=number), snapshots], micro_batches=2)
    assert same(snapshots.after[2], snapshots.after[3]) and not same(snapshots.after[3], snapshots.after[4])


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_run_stopped_among_skipped_steps_resumes_identically(micro_batches, tmp_path, monkeypatch):
    faults = [BadLoss({0, 2, 3, 6})]
    straight, kept, _ = run(tmp_path / "straight", faults=faults, micro_batches=micro_batches)
    for step in range(1, STEPS + 1):
        directory = tmp_path / str(step)
        with pytest.raises(SystemExit):
            run(directory, stop_at=step, monkeypatch=monkeypatch, faults=faults, micro_batches=micro_batches)
        training, checkpointer, _ = run(directory, faults=faults, micro_batches=micro_batches)
        assert checkpointer.best == kept.best
        assert same(list(training.trained().values()), list(straight.trained().values()))
        counted = [CheckpointFiles().load_checkpoint(usable_checkpoint(d)) for d in (directory, tmp_path / "straight")]
        assert [c["callbacks"]["SkippedSteps"] for c in counted] == [{"total": 4, "in_a_row": 0}] * 2


@pytest.mark.slow
def test_too_many_consecutive_skipped_steps_end_the_run_and_the_last_good_state_survives(tmp_path, monkeypatch):
    straight, kept, _ = run(tmp_path / "straight")
    directory = tmp_path / "attention_tuning" / "checkpoints"
    with pytest.raises(Diverged) as ended:
        run(directory, faults=[BadLoss(range(3, 8))], most=4, keep=1)
    last = usable_checkpoint(directory)
    assert step_of(last) == 3 and f"last good checkpoint, {last}." in str(ended.value)
    for part in ("Step 7: 4 steps in a row", "the loss is not finite", "stage.attention_tuning.module.learning_rate"):
        assert part in str(ended.value)
    # Without the fault, the run ends as if it had never occurred.
    training, checkpointer, _ = run(directory)
    assert checkpointer.best == kept.best
    assert same(list(training.trained().values()), list(straight.trained().values()))


def test_the_count_of_consecutive_skipped_steps_survives_a_restart(tmp_path, monkeypatch):
    faults = [BadLoss(range(2, 8))]
    with pytest.raises(SystemExit):
        run(tmp_path, faults=faults, most=5, stop_at=4, monkeypatch=monkeypatch)
    with pytest.raises(Diverged, match="Step 7: 5 steps"):
        run(tmp_path, faults=faults, most=5)


def test_a_stage_with_only_skipped_steps_is_an_error(tmp_path):
    with pytest.raises(Diverged, match=f"Step {STEPS}: {STEPS} steps"):
        run(tmp_path, faults=[BadLoss(range(STEPS))], most=100)


@pytest.mark.slow
def test_a_non_finite_validation_is_never_the_best_and_does_not_reset_patience(tmp_path):
    _, kept, _ = run(tmp_path / "all", faults=[BadValidation({2, 4, 6, 8})], patience=3)
    assert not kept.best and kept.waited == 3 and not list((tmp_path / "all").glob("best-*"))
    _, kept, _ = run(tmp_path / "some", faults=[BadValidation({4, 8})])
    assert kept.best["step"] in (2, 6) and all(map(math.isfinite, kept.best["figures"].values()))


@pytest.mark.slow
@pytest.mark.parametrize("best_by", [None, "val/tau_estimate"])
def test_final_weights_with_a_non_finite_validation_are_refused(best_by, tmp_path):
    class End(Callback):
        def on_fit_end(self, trainer, pl_module):
            with pytest.raises(Diverged, match="final weights have non-finite validation metrics: val/loss"):
                check_final_weights(trainer, pl_module.state_dict())

    run(tmp_path, faults=[BadValidation({2, 4, 6, 8}), End()], best_by=best_by)


@pytest.mark.slow
@pytest.mark.parametrize(("step", "value"), list(product([3, 4, 6, STEPS], [math.nan, math.inf])))
def test_non_finite_weights_never_replace_good_ones(step, value, tmp_path):
    with pytest.raises(Diverged, match="weights are not finite|in a row were skipped"):
        run(tmp_path, faults=[BadWeight(step, value)], most=4)
    found = list(tmp_path.glob("step-*"))
    assert found or step == 3
    for path in found:
        assert step_of(path) < step
        assert not not_finite(CheckpointFiles().load_checkpoint(path)["state_dict"])
    for path in tmp_path.glob("best-*"):
        assert step_of(path) < step


def test_a_fault_names_its_cause_and_rank():
    good = [1.0, 2.0, 9.0, 8.0, 3.0, 4.0]  # losses, weights, blocks, labeled blocks, gradient norms
    for sharded in (False, True):
        figures = step_metrics([good, good], ["a", "b"], sharded=sharded)
        assert figures.loss == 0.5 and figures.weight == 4 and not figures.fault
        assert figures.blocks == 18 and figures.labelled == 16
        assert figures.gradient_norm == pytest.approx((math.sqrt(2) if sharded else 1) * 5 / 4)
        for bad, said in (
            ([math.nan, *good[1:]], "the loss on rank 1"),
            ([*good[:5], math.inf], "the gradient of b on rank 1"),
            ([*good[:4], math.nan, math.nan], "the gradient of a and 1 more on rank 1"),
        ):
            assert step_metrics([good, bad], ["a", "b"], sharded=sharded).fault == f"{said} is not finite"
    assert "gradient norm" in step_metrics([[1.0, 1.0, 1.0, 1.0, LARGEST_NORM]], ["a"], sharded=False).fault
    assert torch.tensor(LARGEST_NORM * 1.001).square().isinf()
