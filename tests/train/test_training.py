"""Training under Lightning: frozen and trained parameters, gradients, resuming, batches."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from helpers.shared import random_target
from helpers.training import data, hashes, module, rows, trainer

from data.batch import IGNORE
from models.draft import UNKNOWN, start_from_head
from train.loop.batches import BatchSettings, TrainingBatches, ValidationBatches
from train.loop.modules import AttentionTuning, BonusCalibration, previous_tokens

STAGES = pytest.mark.parametrize(
    ("stage", "beyond"), list(product([AttentionTuning, BonusCalibration], [False, True])), ids=str
)


@STAGES
def test_only_the_intended_parameters_are_trained(stage, beyond, tmp_path):
    target = random_target()
    text = torch.randint(3, 97, (2, 30))
    before, logits = hashes(target), target(text).logits
    training = module(stage, target, beyond)
    start = {name: p.detach().clone() for name, p in training.draft.own_parameters().items()}
    trainer(tmp_path, 6).fit(training, data())

    assert hashes(target) == before
    assert torch.equal(target(text).logits, logits)  # loading the drafter does not change the target
    own = training.draft.own_parameters()
    trained = training.trained()
    calibrates = stage is BonusCalibration
    assert trained.keys() == {n for n in own if beyond or n.startswith("anchor_bias_mlp") == calibrates}
    for name, parameter in own.items():
        assert (not torch.equal(parameter, start[name])) == (name in trained), name
    with_gradient = {id(p) for p in training.parameters() if p.requires_grad}
    assert with_gradient == {id(p) for p in trained.values()}
    assert training.features(data_batch(target)).hidden.requires_grad == (beyond or not calibrates)


def data_batch(target, num_anchors: int = 4):
    batches = TrainingBatches(rows(), BatchSettings(1, 2, num_anchors, block_size=6, seed=0))
    return batches.batch(0)


@pytest.mark.parametrize("beyond", [False, True])
def test_every_projector_and_slot_input_gets_a_gradient(beyond):
    target = random_target()
    training = module(AttentionTuning, target, beyond)
    training.features(data_batch(target)).hidden.pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in training.trained().values())
    assert all(p.grad is None for p in target.parameters())


@pytest.mark.parametrize(
    ("stage", "micro_batches"), [(AttentionTuning, 1), (AttentionTuning, 4), (BonusCalibration, 2)]
)
def test_a_step_follows_the_gradient_of_the_mean_loss(stage, micro_batches, tmp_path):
    """Uses plain SGD without clipping, because AdamW and clipping hide a constant factor. Stage 2 trains the entire
    drafter; its loss is computed in chunks."""
    training, rows = module(stage, random_target(), beyond=stage is BonusCalibration), data(1)
    start_from_head(training.draft)
    rows.settings = replace(rows.settings, micro_batch_size=4 // micro_batches)
    batches = TrainingBatches(rows.training, BatchSettings(1, 4, num_anchors=40, block_size=6, seed=0))
    total, weight, _, _ = training.loss(batches.batch(0))
    names, parameters = zip(*training.trained().items(), strict=True)
    gradients = torch.autograd.grad(total / weight, parameters)
    start = [p.detach().clone() for p in parameters]
    training.configure_optimizers = lambda: torch.optim.SGD(parameters, lr=1.0)
    trainer(tmp_path, 1, accumulate_grad_batches=micro_batches, gradient_clip_val=None).fit(training, rows)
    for name, before, after, gradient in zip(names, start, parameters, gradients, strict=True):
        assert torch.allclose(before - after, gradient, rtol=1e-3, atol=1e-6), name


def test_the_calibrator_starts_without_effect_and_trains_only_on_blocks_that_decoding_can_reach():
    target = random_target()
    training = module(BonusCalibration, target, beyond=True)
    batch = data_batch(target)
    found = training.features(batch)
    known = found.bonus[..., None].expand(found.labels.shape)
    plain = training.draft.logits(found.hidden)
    assert torch.equal(training.draft.logits(found.hidden, known, found.previous), plain)
    start_from_head(training.draft)
    assert torch.equal(training.draft.logits(found.hidden, known, found.previous), plain)
    said_otherwise = found.bonus != batch.input_ids.gather(1, batch.anchors)
    assert said_otherwise.any() and (found.labels[said_otherwise] == IGNORE).all()


def test_blocks_given_their_bonus_token_know_the_token_before_each_slot_and_no_other():
    torch.manual_seed(0)
    labels, bonus = torch.randint(3, 97, (2, 7, 6)), torch.randint(3, 97, (2, 7))
    for a in range(7):
        labels[:, a, a:] = IGNORE  # end of the answer
    bonus[:, ::3] = UNKNOWN
    before = previous_tokens(labels, bonus)
    for r, a, j in product(range(2), range(7), range(6)):
        known = bonus[r, a] != UNKNOWN and j > 0 and (j == 1 or labels[r, a, j - 1] != IGNORE)
        assert before[r, a, j] == ((bonus[r, a] if j == 1 else labels[r, a, j - 1]) if known else UNKNOWN)


@pytest.mark.parametrize(("fraction", "revealed"), [(0.0, 0), (0.25, 2), (0.5, 4), (1.0, 8)])
def test_the_fraction_of_blocks_given_their_bonus_token(fraction, revealed):
    training = module(AttentionTuning, random_target(), beyond=True)
    training.bonus_slot_fraction = fraction
    assert (training.mask_bonus(torch.zeros(3, 8, dtype=torch.long)) != UNKNOWN).sum(1).tolist() == [revealed] * 3


@pytest.mark.slow(but="AttentionTuning'>-True")
@STAGES
def test_a_resumed_run_ends_with_the_same_weights(stage, beyond, tmp_path):
    straight = module(stage, random_target(), beyond)
    trainer(tmp_path, 6).fit(straight, data())

    first = module(stage, random_target(), beyond)
    half = trainer(tmp_path, 3)
    half.fit(first, data())
    half.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == set(first.trained())  # without the target

    second = module(stage, random_target(), beyond)
    trainer(tmp_path, 6).fit(second, data(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for name, parameter in straight.trained().items():
        assert torch.equal(parameter, second.trained()[name]), name


def test_the_global_batch_does_not_depend_on_the_number_of_ranks():
    settings = BatchSettings(steps=9, global_batch_size=4, num_anchors=5, block_size=6, seed=3)
    packed = rows()
    alone = TrainingBatches(packed, settings)
    pair = [TrainingBatches(packed, settings, rank=r, world_size=2) for r in range(2)]
    for step in (0, 4, 8):  # also past the first epoch
        whole, parts = alone.batch(step), [p.batch(step) for p in pair]
        assert torch.equal(whole.input_ids, torch.cat([p.input_ids for p in parts]))
        assert torch.equal(whole.anchors, torch.cat([p.anchors for p in parts]))
    with pytest.raises(ValueError, match="must be a multiple of 3, the number of ranks"):
        TrainingBatches(packed, settings, rank=0, world_size=3)


def test_validation_covers_every_row_once_with_equal_batches_on_all_ranks():
    packed = list(rows())[:7]
    settings = BatchSettings(1, 2, num_anchors=5, block_size=6, seed=0, micro_batch_size=2)
    alone = list(ValidationBatches(packed, settings))
    pair = [list(ValidationBatches(packed, settings, rank=r, world_size=2)) for r in range(2)]
    assert [b.labels.shape for b in pair[0]] == [b.labels.shape for b in pair[1]]
    together = torch.cat([b.labels for b in pair[0] + pair[1]])
    assert torch.equal(together[:7], torch.cat([b.labels for b in alone])) and (together[7:] == -100).all()


def test_each_epoch_sees_every_row_once_in_a_new_order():
    packed = rows()
    batches = TrainingBatches(packed, BatchSettings(10**6, 1, num_anchors=2, block_size=6, seed=0))
    orders = [[batches._row_at(epoch * len(packed) + i) for i in range(len(packed))] for epoch in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(len(packed)))
    assert orders[0] != orders[1]
