"""Two ranks under every strategy match one rank, and either resumes from the other's checkpoint."""

import os
import signal
from pathlib import Path

import pytest
import torch
from helpers.shared import SHORT, command, command_stopped_at_checkpoint
from safetensors.torch import load_file

from train.checkpoint.files import CheckpointFiles
from train.evaluate.plots import read_metrics

STAGES = ("attention_tuning", "bonus_calibration")
# With the default eps, AdamW takes a full step from a gradient that is only rounding error, and hides a constant factor
# of all gradients. A large eps avoids both.
CALL = (*SHORT, "trainer.precision=32-true", f"stages=[{','.join(STAGES)}]")
CALL += tuple(f"stage.{stage}.{setting}" for stage in STAGES for setting in ("steps=12", "num_anchors=8"))
CALL += tuple(f"stage.{stage}.module.{setting}" for stage in STAGES for setting in ("eps=1e-3", "learning_rate=1e-3"))
CALL += tuple(
    f"stage.{stage}.{setting}" for stage in STAGES for setting in ("global_batch_size=4", "checkpoint_every=6")
)
CALL += tuple(f"stage.{stage}.decode.{setting}" for stage in STAGES for setting in ("prompts=3", "max_new_tokens=10"))
CALL += tuple(f"stage.{stage}.validate_every=6" for stage in STAGES)
PAIR = ("trainer.accelerator=cpu", "trainer.devices=2")
# Otherwise DeepSpeed keeps tensors of this size unsharded after their first use.
SHARDED = "+trainer.strategy.zero_optimization={stage3_param_persistence_threshold:0,stage3_max_live_parameters:0}"
MICRO_BATCHES = tuple(f"stage.{stage}.micro_batch_size=1" for stage in STAGES)
CHUNKS = tuple(f"stage.{stage}.module.chunk=37" for stage in STAGES)  # the head is gathered for each chunk
NO_COMPILER = {"PATH": "/nowhere"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(tmp_path_factory.mktemp("alone"))


def run(cwd, *overrides: str, **environment: str):
    done = command(*CALL, *overrides, "name=short", cwd=cwd, **environment)
    assert done.returncode == 0, done.stderr
    return cwd / "checkpoints" / "short"


def difference(run_dir, other_dir) -> float:
    """Return the largest difference of a trained weight."""
    pairs = [[load_file(d / stage / "draft.safetensors") for d in (run_dir, other_dir)] for stage in STAGES]
    return max(float((mine[name] - other[name]).abs().max()) for mine, other in pairs for name in mine)


def decoded(run_dir) -> list[tuple[int, str, float]]:
    """Return the metrics of decoding during training by stage and step."""
    return [
        (step, name, value)
        for stage in STAGES
        for step, row in sorted(read_metrics(run_dir / stage).items())
        for name, value in sorted(row.items())
        if name.startswith(("val/tau", "val/accept")) and name != "val/tau_estimate"
    ]


def assert_same(alone, run_dir) -> None:
    assert difference(alone, run_dir) < 1e-6
    assert decoded(alone) == decoded(run_dir) and len(decoded(alone)) == 2 * 2 * (3 + 7)
    for stage in STAGES:  # before clipping
        norms = [read_metrics(d / stage)[10]["train/gradient_norm"] for d in (alone, run_dir)]
        assert norms[0] > 0 and norms[1] == pytest.approx(norms[0], rel=1e-4)


@pytest.mark.slow
def test_ddp_equals_one_rank(alone, tmp_path):
    assert_same(alone, run(tmp_path, "trainer.devices=2"))


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_zero_equals_one_rank(alone, tmp_path, zero):
    """Add each strategy's specific risk: micro-batches (divided twice), sharded tensors and a chunked loss."""
    extra = {1: (), 2: MICRO_BATCHES, 3: (SHARDED, *CHUNKS)}[zero]
    assert_same(alone, run(tmp_path, f"trainer=zero{zero}", *PAIR, *extra, **NO_COMPILER))


# A non-finite loss of one rank in the first step, when the optimizer has no state, and in a later step. In the later
# step the gradient is finite, so DeepSpeed by itself would take the step.
BAD = ("+callbacks.bad._target_=helpers.faults.BadLoss", "+callbacks.bad.steps=[4]", "stages=[attention_tuning]")
BAD += ("+callbacks.inf._target_=helpers.faults.InfiniteLoss", "+callbacks.inf.steps=[0]")
BAD += ("stage.attention_tuning.steps=8", "stage.attention_tuning.checkpoint_every=1")


@pytest.fixture(scope="module")
def alone_with_bad_steps(tmp_path_factory):
    return faulty(tmp_path_factory.mktemp("bad"), *on_rank(0), said="the loss is not finite")


def on_rank(rank: int) -> tuple[str, ...]:
    return (f"+callbacks.bad.rank={rank}", f"+callbacks.inf.rank={rank}")


def faulty(cwd, *overrides: str, said: str):
    """Return the run directory of a run with two bad steps, each reported once with `said`."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = command(*CALL, *BAD, *overrides, "name=short", cwd=cwd, PYTHONPATH=path, **NO_COMPILER)
    assert done.returncode == 0, done.stderr
    lines = [line[line.index("step") :] for line in done.stdout.splitlines() if "skipped" in line]
    assert lines == [f"step {step}: skipped because {said} (1 in a row; the stage stops at 5)" for step in (1, 5)]
    return cwd / "checkpoints" / "short"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_all_ranks_skip_the_same_steps_under_every_strategy(alone_with_bad_steps, tmp_path, strategy):
    chosen = {"ddp": ("trainer.devices=2",)}.get(strategy, (f"trainer={strategy}", *PAIR))
    chosen += {"zero2": MICRO_BATCHES, "zero3": (SHARDED,)}.get(strategy, ())
    run_dir = faulty(tmp_path, *chosen, *on_rank(1), said="the loss on rank 1 is not finite")
    figures = [read_metrics(d / "attention_tuning") for d in (alone_with_bad_steps, run_dir)]
    pair = [load_file(d / "attention_tuning" / "draft.safetensors") for d in (alone_with_bad_steps, run_dir)]
    assert max(float((mine - pair[1][name]).abs().max()) for name, mine in pair[0].items()) < 1e-6
    for key in ("val/loss", "train/skipped_steps"):
        assert [row[key] for row in figures[1].values() if key in row] == pytest.approx(
            [row[key] for row in figures[0].values() if key in row], abs=1e-5
        )


@pytest.mark.slow
def test_joint_training_beyond_the_paper_equals_one_rank(tmp_path_factory):
    """The hardest case: every rank has a shard of each tensor, and the head of the loss is trained as well."""
    beyond = ("+recipe=beyond", "model.draft.chain_rank=16", *(f"stage.{stage}.steps=4" for stage in STAGES))
    beyond += tuple(f"stage.{stage}.validate_every=4" for stage in STAGES)
    one = run(tmp_path_factory.mktemp("one"), *beyond)
    two = run(tmp_path_factory.mktemp("two"), *beyond, "trainer=zero3", *PAIR, SHARDED, *CHUNKS, **NO_COMPILER)
    assert difference(one, two) < 1e-6 and decoded(one) == decoded(two)


@pytest.mark.slow
def test_a_run_may_change_its_ranks_and_strategy_on_resume(alone, tmp_path):
    """One rank, two under ZeRO 2, one again: data and losses match a run on one rank."""
    stop = {"cwd": tmp_path, "number": signal.SIGUSR1}
    assert command_stopped_at_checkpoint(*CALL, stage="attention_tuning", **stop).returncode == 75
    directory = tmp_path / "checkpoints" / "short" / "attention_tuning" / "checkpoints"
    one = CheckpointFiles().load_checkpoint(max(directory.glob("step-*")))
    zero2 = ("trainer=zero2", *PAIR)
    assert command_stopped_at_checkpoint(*CALL, *zero2, stage="bonus_calibration", **stop).returncode == 75
    directory = directory.parents[1] / "bonus_calibration" / "checkpoints"
    two = CheckpointFiles().load_checkpoint(max(directory.glob("step-*")))
    run_dir = run(tmp_path)
    for stage in STAGES:
        losses = [{step: row["train/loss"] for step, row in read_metrics(d / stage).items() if "train/loss" in row}
                  for d in (alone, run_dir)]  # fmt: skip
        assert losses[0].keys() == losses[1].keys()
        assert all(abs(loss - losses[1][step]) < 1e-5 for step, loss in losses[0].items())
    assert difference(alone, run_dir) < 1e-6
    # Both contain the trained parameters and their moments in float32, without the target.
    for saved in (one, two):
        trained = sum(t.numel() for t in saved["state_dict"].values())
        tensors = [*saved["state_dict"].values()]
        tensors += [t for s in saved["optimizer_states"][0]["state"].values() for t in s.values() if t.dim()]
        assert sum(t.numel() for t in tensors) == 3 * trained and all(t.dtype == torch.float32 for t in tensors)


@pytest.mark.slow
def test_zero_keeps_float32_master_weights_under_bfloat16_arithmetic(tmp_path):
    settings = (
        "trainer=zero2",
        *PAIR,
        "trainer.precision=bf16-mixed",
        "stage.attention_tuning.steps=3",
        "stages=[attention_tuning]",
    )
    done = command(*CALL, *settings, "name=short", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    weights = load_file(tmp_path / "checkpoints" / "short" / "attention_tuning" / "draft.safetensors")
    assert all(t.dtype == torch.float32 for t in weights.values())
    assert any((t != t.bfloat16().float()).any() for t in weights.values())
