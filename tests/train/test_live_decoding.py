"""Decoding during training uses the current weights, does not affect training, and agrees on all ranks."""

import copy
import random
from collections import Counter

import numpy as np
import pytest
import torch
from helpers.configs import composed
from helpers.runs import History
from helpers.shared import random_documents, random_draft, random_target
from helpers.training import data, module, rows, trainer

from data.errors import UserError
from data.preprocess.document import Document
from data.preprocess.packing import pack_documents
from models.acceptance import acceptance_by_slot, mean_acceptance_length, tau_interval
from models.decoding.flex import generate
from models.decoding.selection import OFF
from models.draft import DraftModel
from models.draft_config import DraftConfig
from models.export.artifact_io import export_draft, load_draft
from train.checkpoint import checkpoints
from train.checkpoint.checkpoints import Checkpoints
from train.checkpoint.files import CheckpointFiles, usable_checkpoint
from train.checkpoint.rng_state import random_state
from train.endings import preemption
from train.loop.modules import AttentionTuning, BonusCalibration
from train.loop.validation_decoding import LiveDecoding, as_exported, live_decoding
from train.settings.checks import check_decoding

STEPS = 6
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14, 15, 16], [17]]
LIVE = {"max_new_tokens": 12, "batch_size": 2}


class Logged:
    """Record the callback's metrics by step."""

    def __init__(self) -> None:
        self.rows = {}

    def log_metrics(self, figures, step):
        self.rows.setdefault(step, {}).update(figures)


class Recorded(LiveDecoding):
    """Keep the metrics and the weights at that time."""

    def on_validation_epoch_end(self, trainer, pl_module):
        loggers, logged = trainer.loggers, Logged()
        trainer._loggers = [logged]
        super().on_validation_epoch_end(trainer, pl_module)
        trainer._loggers = loggers
        self.drafts = getattr(self, "drafts", {})
        self.drafts[trainer.global_step] = (
            {name: p.detach().clone() for name, p in pl_module.draft.own_parameters().items()},
            logged.rows[trainer.global_step],
        )


def run(directory, stage=AttentionTuning, *, live=True, stop_at=None, monkeypatch=None, **keeping):
    """Train a drafter of the small target; stop at a given step as a signal would."""
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(1)
    checkpointer = Checkpoints(
        directory, **{"every": 2, "keep": 2, "validate_every": 2, "best_by": "val/tau"} | keeping
    )
    history, decoding = History(), [Recorded(PROMPTS, **LIVE)] if live else []
    fitted = trainer(
        directory, STEPS, val_check_interval=2, check_val_every_n_epoch=None, enable_checkpointing=True,
        callbacks=[history, *decoding, checkpointer], plugins=[CheckpointFiles()],
    )  # fmt: skip
    training = module(stage, random_target())
    if stop_at:
        monkeypatch.setattr(checkpoints, "agreed_signal", lambda _: 10 if fitted.global_step >= stop_at else 0)
    try:
        fitted.fit(training, data(STEPS), ckpt_path=usable_checkpoint(directory), weights_only=True)
    finally:
        monkeypatch.undo() if monkeypatch else None
        preemption.set_training(False)
    return training, checkpointer, history, *decoding


def by_hand(drafter: DraftModel) -> list[list[int]]:
    """Return the accepted drafts by prompt, decoded one prompt at a time."""
    results = [
        generate(drafter.target, drafter, [p], max_new_tokens=LIVE["max_new_tokens"], selection=OFF) for p in PROMPTS
    ]
    return [result.accepted() for result in results]


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, right[name]) for name, tensor in left.items())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [AttentionTuning, BonusCalibration])
def test_decoding_does_not_affect_training(stage, tmp_path):
    with_it, _, noticed, _ = run(tmp_path / "with", stage, best_by=None)
    state = random_state()
    without, _, history = run(tmp_path / "without", stage, best_by=None, live=False)
    assert same(with_it.trained(), without.trained()) and noticed.drawn == history.drawn
    assert torch.equal(state["ranks"][0]["torch"], random_state()["ranks"][0]["torch"])
    assert all(p.requires_grad for p in with_it.trained().values())
    assert {id(p) for p in with_it.parameters() if p.requires_grad} == {id(p) for p in with_it.trained().values()}


@pytest.mark.slow
def test_decoding_uses_the_current_weights(tmp_path):
    """Each metric equals that of a separate drafter with the same weights."""
    _, _, _, decoding = run(tmp_path)
    assert list(decoding.drafts) == [2, 4, 6]
    drafter, taus = DraftModel(random_target(), DraftConfig(num_layers=3, block_size=6, calibrator_rank=0)), set()
    for weights, figures in decoding.drafts.values():
        with torch.no_grad():
            for name, parameter in drafter.own_parameters().items():
                parameter.copy_(weights[name])
        by_prompt = by_hand(drafter)
        accepted = [count for counts in by_prompt for count in counts]
        assert figures["val/tau"] == mean_acceptance_length(accepted)
        assert (figures["val/tau_low"], figures["val/tau_high"]) == tau_interval(by_prompt)
        assert [figures[f"val/accept_{j}"] for j in range(1, 6)] == acceptance_by_slot(accepted, 6)
        assert figures["val/decode_seconds"] > 0
        taus.add(figures["val/tau"])
    assert len(taus) > 1


@pytest.mark.slow
def test_the_calibrator_is_used():
    """A calibrator that always drafts the target's most frequent token is right that often."""
    draft = random_draft(random_target())
    said = generate(draft.target, None, PROMPTS, max_new_tokens=12).tokens
    token, _ = Counter(token for row in said for token in row[1:]).most_common(1)[0]
    live, before = LiveDecoding(PROMPTS, **LIVE), by_hand(draft)
    with torch.no_grad():
        draft.anchor_bias_mlp[2].bias[token] += 1e4
    assert live._decode(draft, PROMPTS) == by_hand(draft) != before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoding_matches_the_exported_drafter(dtype, tmp_path):
    """Float32 master weights, target in either dtype: the copy equals `load_draft`, and the masters are unchanged."""
    target = random_target(dtype)
    torch.manual_seed(1)
    draft = DraftModel(target, DraftConfig(num_layers=3, block_size=6, calibrator_rank=8), dtype=torch.float32)
    with torch.no_grad():
        for parameter in draft.own_parameters().values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    masters = {name: p.clone() for name, p in draft.own_parameters().items()}
    twin = as_exported(draft)
    export_draft(draft, tmp_path, target.dtype)
    loaded = load_draft(tmp_path, target).own_parameters()
    assert twin.own_parameters().keys() == loaded.keys() and same(twin.own_parameters(), loaded)
    assert all(p.dtype == target.dtype and not p.requires_grad for p in twin.own_parameters().values())
    assert same(draft.own_parameters(), masters) and all(p.dtype == torch.float32 for p in masters.values())
    shared = {id(p) for p in target.parameters()}
    assert {id(p) for p in twin.parameters()} - shared == {id(p) for p in twin.own_parameters().values()}
    assert twin.layers[0].mlp is target.model.layers[2].mlp
    with torch.no_grad():
        next(iter(twin.own_parameters().values())).zero_()
    assert same(draft.own_parameters(), masters)


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_resumed_run_has_the_same_metrics_and_best_weights(step, tmp_path, monkeypatch):
    straight, kept, _, figures = run(tmp_path / "straight")
    with pytest.raises(SystemExit):
        run(tmp_path / "stopped", stop_at=step, monkeypatch=monkeypatch)
    training, checkpointer, history, rest = run(tmp_path / "stopped")
    assert history.validations == [s for s in (2, 4, 6) if s > step]
    assert same(straight.trained(), training.trained())
    assert (
        checkpointer.best == kept.best and checkpointer.figures() == kept.figures() and checkpointer.best["value"] > 1
    )
    for at, (_, found) in rest.drafts.items():
        expected = figures.drafts[at][1]
        assert {k: v for k, v in found.items() if "seconds" not in k} == {
            k: v for k, v in expected.items() if "seconds" not in k
        }


class Scripted(LiveDecoding):
    """Return given metrics instead of decoding."""

    def __init__(self, taus) -> None:
        self.taus = taus

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log_dict({"val/tau": self.taus[trainer.global_step]}, logger=False)


def patient(directory, taus, **arguments):
    """Call `run` with given metrics and a validation at each step."""
    monkeypatched = pytest.MonkeyPatch()
    monkeypatched.setitem(globals(), "Recorded", lambda *_, **__: Scripted(taus))
    try:
        return run(directory, **{"validate_every": 1, "patience": 2, "every": 3} | arguments)
    finally:
        monkeypatched.undo()


FLAT = {1: 1.5, 2: 2.0, 3: 1.9, 4: 2.0, 5: 3.0, 6: 3.0}


@pytest.fixture
def each_step(monkeypatch):
    """Validate at each step."""
    inner = trainer

    def every_step(*args, **kwargs):
        return inner(*args, **kwargs | {"val_check_interval": 1})

    monkeypatch.setitem(globals(), "trainer", every_step)


@pytest.mark.slow
def test_patience_ends_the_stage(tmp_path, each_step):
    training, checkpointer, history, _ = patient(tmp_path, FLAT)
    assert history.validations == [1, 2, 3, 4] and list(history.losses) == [1, 2, 3, 4]  # equal is not better
    assert checkpointer.best["step"] == 2 and checkpointer.out_of_patience() and training.trainer.global_step == 4
    whole, kept, long, _ = patient(tmp_path / "whole", FLAT, patience=None)
    assert long.validations == [1, 2, 3, 4, 5, 6] and kept.best["step"] == 5
    assert all(long.losses[step] == loss for step, loss in history.losses.items())


@pytest.mark.slow
def test_patience_survives_a_restart_and_a_crash_at_the_end(tmp_path, each_step, monkeypatch):
    with pytest.raises(SystemExit):
        patient(tmp_path, FLAT, stop_at=3, monkeypatch=monkeypatch)  # one validation without improvement
    first, checkpointer, history, _ = patient(tmp_path, FLAT)
    assert history.validations == [4] and checkpointer.out_of_patience()
    again, checkpointer, history, _ = patient(tmp_path, FLAT)  # killed before the stage's record was written
    assert not history.losses and not history.validations and again.trainer.global_step == 4
    assert checkpointer.best["step"] == 2 and same(first.trained(), again.trained())


def test_nan_is_never_the_best(tmp_path, each_step):
    nan = float("nan")
    _, checkpointer, history, _ = patient(tmp_path, {1: nan, 2: 2.0, 3: nan, 4: nan})
    assert checkpointer.best["step"] == 2 and history.validations == [1, 2, 3, 4]


def test_a_checkpoint_from_before_patience_loads():
    checkpointer = Checkpoints(None, every=1, keep=1, validate_every=1, best_by="val/tau")
    checkpointer.load_state_dict({"best": {}, "last": {}, "best_of": {}, "random": None})
    assert checkpointer.waited == 0


def test_prompts_are_the_beginnings_of_the_first_documents_that_leave_room():
    documents = random_documents(20, seed=3)
    silent_at_first = Document(np.arange(3, 13, dtype=np.int32), np.ones(10, bool))
    packed = pack_documents([silent_at_first, *documents], 64, pad_id=0)
    expected = [d.input_ids[: list(d.supervised).index(True)].tolist() for d in documents]
    assert packed.prompts(7, 100) == expected[:7]
    assert packed.prompts(100, 3) == [p for p in expected if len(p) <= 3]
    assert packed.prompts(100, 100) == expected


def settings(stage="attention_tuning", **changes):
    return composed("+experiment=tiny", *(f"stage.{stage}.{key}={value}" for key, value in changes.items()))


def test_the_settings_determine_the_prompts():
    config, validation = settings(**{"decode.prompts": 4}), rows(10)
    twice = [live_decoding(config, "attention_tuning", validation, 256)[0].prompts for _ in range(2)]
    assert twice[0] == twice[1] == validation.prompts(4, 256) and len(twice[0]) == 4
    assert live_decoding(settings(**{"decode.prompts": 0}), "attention_tuning", validation, 256) == []
    assert live_decoding(config, "attention_tuning", pack_documents([], 64, pad_id=0), 256) == []
    with pytest.raises(UserError, match="max_new_tokens=32.*context length of 40"):
        live_decoding(config, "attention_tuning", validation, 40)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"best_by": "val/tau", "decode.prompts": 0}, r"best_by=val/tau with .*decode.prompts=0"),
        ({"best_by": "null", "patience": 3}, "patience=3 with .*best_by=null"),
        ({"patience": 0}, "patience=0: must be >= 1"),
        ({"decode.max_new_tokens": 1}, "max_new_tokens=1: must be >= 2"),
        ({"decode.batch_size": 0}, "batch_size=0: must be >= 1"),
    ],
)
def test_inconsistent_settings_are_refused(changes, words):
    for stage in ("attention_tuning", "bonus_calibration"):  # both are checked before the first stage
        with pytest.raises(UserError, match=words):
            check_decoding(settings(stage, **changes))


@pytest.mark.slow
def test_consistent_settings_are_accepted():
    for changes in ({}, {"best_by": "val/tau"}, {"decode.prompts": 0, "best_by": "val/tau_estimate"}, {"patience": 2}):
        check_decoding(settings(**changes))


def interval_by_loops(accepted, level, resamples, seed):
    drawn = np.random.default_rng(seed).integers(len(accepted), size=(resamples, len(accepted)))
    taus = [mean_acceptance_length([a for i in picked for a in accepted[i]]) for picked in drawn.tolist()]
    return tuple(np.quantile(taus, [(1 - level) / 2, (1 + level) / 2]))


def test_the_interval_is_bootstrapped_over_prompts():
    generator = np.random.default_rng(5)
    accepted = [generator.integers(0, 8, generator.integers(1, 9)).tolist() for _ in range(12)]
    state = copy.deepcopy(random_state())
    for level in (0.5, 0.95):
        found = tau_interval(accepted, level=level, resamples=200, seed=3)
        assert found == pytest.approx(interval_by_loops(accepted, level, 200, 3))
    assert torch.equal(state["ranks"][0]["torch"], random_state()["ranks"][0]["torch"])
    assert tau_interval(accepted) == tau_interval([*accepted, []])  # a prompt without steps has no weight
    assert tau_interval([[3] * 5] * 4) == (4.0, 4.0)
    low, high = tau_interval([[0] * 50, [7] * 50])  # two prompts count as two, regardless of their steps
    assert (low, high) == (1.0, 8.0)
    assert all(np.isnan(tau_interval(few)).all() for few in ([[], []], [[3, 1], []]))
    for wrong in ({"level": 1.0}, {"resamples": 0}):
        with pytest.raises(ValueError, match="expected"):
            tau_interval(accepted, **wrong)
