"""Blocks without a label do not contribute to the loss: few labels are a warning, none an error."""

import pytest
import torch
from helpers.configs import composed
from helpers.runs import STEPS, run

from train.endings.agreed import AgreedEnd
from train.endings.labels import LOW, LabelledBlocks
from train.endings.preemption import set_training
from train.loop import modules
from train.loop.fit import build_trainer
from train.loop.modules import AttentionTuning, BonusCalibration


@pytest.fixture
def target_says(monkeypatch):
    """Set the target's predictions at the anchors: the text's token in a fraction of the blocks, else token 1."""

    def says(share):
        def bonus(target, hidden, anchors):
            number = torch.arange(anchors.shape[1])
            agrees = ((number + 1) * share).floor() > (number * share).floor()
            return torch.where(agrees, says.batch.input_ids.gather(1, anchors), 1)

        monkeypatch.setattr(modules, "bonus_tokens", bonus)

    features = BonusCalibration.features

    def remembered(self, batch):
        says.batch = batch
        return features(self, batch)

    monkeypatch.setattr(BonusCalibration, "features", remembered)
    return says


@pytest.mark.slow(but="[2]")
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_stage_without_labels_is_an_error_with_a_fix(micro_batches, target_says, tmp_path):
    target_says(0.0)
    with pytest.raises(AgreedEnd, match=f"none of the [0-9,]+ blocks in {STEPS} steps.*data.regenerate") as ended:
        run(tmp_path, stage=BonusCalibration, faults=[LabelledBlocks()], micro_batches=micro_batches)
    assert ended.value.status == 1 and not list(tmp_path.glob("best-*"))


def test_a_target_with_random_weights_only_gets_a_warning(target_says, tmp_path, capsys):
    """Such a target only tests a command; blocks without labels are expected."""
    target_says(0.0)
    run(tmp_path, stage=BonusCalibration, faults=[LabelledBlocks(needed=False)])
    assert "warning: only 0.0% of the blocks have a label" in capsys.readouterr().out
    for choice, needed in (("model=tiny", True), ("model=stand_in", False)):
        made = build_trainer(composed("+experiment=tiny", choice), "bonus_calibration", tmp_path / choice).callbacks
        assert [c.needed for c in made if isinstance(c, LabelledBlocks)] == [needed]


def test_a_long_stage_is_checked_before_its_end(target_says, tmp_path, monkeypatch):
    target_says(0.0)
    monkeypatch.setattr("train.endings.labels.LOOK", 3)
    with pytest.raises(AgreedEnd, match="Step 3: none of the"):
        run(tmp_path, stage=BonusCalibration, faults=[LabelledBlocks()])


@pytest.mark.slow(but="[0.2]")
@pytest.mark.parametrize("share", [0.05, 0.2, 0.3, 1.0])
def test_a_low_fraction_of_labeled_blocks_is_a_warning_with_the_fraction(share, target_says, tmp_path, capsys):
    target_says(share)
    counted = LabelledBlocks()
    run(tmp_path, stage=BonusCalibration, faults=[counted])
    assert counted.labelled / counted.blocks == pytest.approx(share, abs=0.1)
    lines = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(lines) == (share < LOW)
    assert all(f"{counted.labelled / counted.blocks:.1%} of the blocks" in s and "data.regenerate" in s for s in lines)


@pytest.mark.parametrize(("share", "count"), [(0.0, 4), (1.0, 0)])
def test_an_unmeasured_selection_metric_is_reported(share, count, target_says, tmp_path, capsys):
    target_says(share)
    _, kept, history = run(tmp_path, stage=BonusCalibration)
    lines = [s for s in capsys.readouterr().out.splitlines() if "val/tau_estimate was not measured" in s]
    assert len(lines) == count and bool(kept.best) == (not count) and len(history.validations) == 4


def test_attention_tuning_trains_on_all_blocks(tmp_path, capsys):
    counted = LabelledBlocks()
    run(tmp_path, stage=AttentionTuning, faults=[counted])
    assert 0 < counted.labelled == counted.blocks and counted.steps == STEPS
    assert "warning" not in capsys.readouterr().out


def test_the_count_continues_after_a_restart(target_says, tmp_path, monkeypatch):
    """Otherwise the few steps after a restart could raise an error by chance."""
    target_says(0.05)
    straight, resumed = LabelledBlocks(), LabelledBlocks()
    run(tmp_path / "straight", stage=BonusCalibration, faults=[straight])
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        run(tmp_path / "stopped", stage=BonusCalibration, faults=[LabelledBlocks()], stop_at=5, monkeypatch=patch)
    set_training(False)
    run(tmp_path / "stopped", stage=BonusCalibration, faults=[resumed])
    assert straight.state_dict() == resumed.state_dict() and straight.steps == STEPS


@pytest.mark.parametrize("stage", ["attention_tuning", "bonus_calibration"])
def test_every_stage_counts_its_labeled_blocks(stage, tmp_path):
    callbacks = build_trainer(composed("+experiment=tiny"), stage, tmp_path / stage).callbacks
    kinds = [type(callback).__name__ for callback in callbacks]
    assert kinds.index("LabelledBlocks") < kinds.index(
        "Checkpoints"
    )  # so that each checkpoint contains the count of its step
