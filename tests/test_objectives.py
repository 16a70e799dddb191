"""Losses and acceptance against slow references in float64."""

import math

import pytest
import torch
from conftest import random_documents, random_draft, random_target
from hypothesis import given, settings
from hypothesis import strategies as st

from data.anchors import make_batch, valid_anchors
from data.batch import IGNORE
from data.packing import pack_documents
from models.metrics import acceptance_by_slot, accepted_drafts, mean_acceptance_length
from models.objectives import block_loss, decay_weights, dpace_weights, token_losses
from models.target import target_pass

OBJECTIVE = {"weights": "dpace", "alpha": 0.5, "gamma": 4.0, "slot0_loss": False, "chunk": 10_000}


def reference_block_loss(logits, labels, weights, alpha, gamma, slot0_loss):
    """One slot at a time. logits [R, A, B, V], labels [R, A, B]."""
    total = weight_total = 0.0
    for row in range(labels.shape[0]):
        for block in range(labels.shape[1]):
            losses = []
            for slot in range(0 if slot0_loss else 1, labels.shape[2]):
                label = int(labels[row, block, slot])
                if label == IGNORE:
                    break
                z = logits[row, block, slot].double()
                losses.append(float(torch.logsumexp(z, 0) - z[label]))
            for j in range(len(losses)):
                if weights == "dpace":
                    confidence = [(1 - alpha) * math.exp(-loss) + alpha for loss in losses]
                    weight = sum(math.prod(confidence[: m + 1]) for m in range(j, len(losses)))
                elif weights == "decay":
                    weight = math.exp(-j / gamma)
                else:
                    weight = 1.0
                total += weight * losses[j]
                weight_total += weight
    return total, weight_total


@pytest.mark.parametrize("weights", ["dpace", "decay", "flat"])
@pytest.mark.parametrize("slot0_loss", [False, True])
def test_block_loss_equals_loops(weights, slot0_loss):
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 5, 6, 8, dtype=torch.float64), torch.randn(11, 8, dtype=torch.float64)
    labels = torch.randint(0, 11, (2, 5, 6))
    for block, length in enumerate([6, 2, 3, 0, 5]):
        labels[:, block, length:] = IGNORE
    settings = OBJECTIVE | {"weights": weights, "slot0_loss": slot0_loss}
    total, weight, correct = block_loss(lambda h, b: h @ head.T, hidden, labels, None, **settings)
    expected = reference_block_loss(hidden @ head.T, labels, weights, 0.5, 4.0, slot0_loss)
    assert (float(total), float(weight)) == pytest.approx(expected, rel=1e-6)
    hits = ((hidden @ head.T).argmax(-1) == labels)[..., 1:]
    assert (correct == hits).all()


def test_chunks_change_neither_loss_nor_gradient():
    torch.manual_seed(0)
    head, labels = torch.randn(11, 8, dtype=torch.float64), torch.randint(0, 11, (50,))
    results = []
    for pieces in (1, 3, 60):
        hidden = torch.linspace(-1, 1, 400, dtype=torch.float64).view(50, 8).sin().requires_grad_()
        losses, _ = token_losses(lambda h, b: h @ head.T, hidden, None, labels, pieces)
        (losses * torch.arange(50)).sum().backward()
        results.append((losses.detach(), hidden.grad))
    for losses, gradient in results[1:]:
        assert torch.allclose(losses, results[0][0]) and torch.allclose(gradient, results[0][1])


def test_the_head_is_called_as_often_whatever_is_supervised():
    """Under ZeRO 3 each call is a collective: ranks that differ in it wait for ever."""
    head, hidden, calls = torch.randn(11, 8), torch.randn(2, 3, 6, 8), []

    def logits(hidden, bonus):
        calls[-1] += 1
        return hidden @ head.T

    for share in (0.0, 0.1, 0.9):
        calls.append(0)
        labels = torch.where(torch.rand(2, 3, 6) < share, torch.randint(0, 11, (2, 3, 6)), -100)
        block_loss(logits, hidden, labels, None, **OBJECTIVE | {"chunk": 7})
    assert calls == [5, 5, 5]  # 30 slots, 7 at a time


def test_dpace_falls_from_slot_to_slot_and_is_detached():
    losses = torch.rand(20, 7, requires_grad=True)
    weights = dpace_weights(losses, torch.ones(20, 7, dtype=torch.bool), alpha=0.5)
    assert not weights.requires_grad and (weights.diff(dim=-1) < 0).all()
    sure = dpace_weights(torch.zeros(1, 7), torch.ones(1, 7, dtype=torch.bool), alpha=0.5)
    assert sure.tolist() == [[7, 6, 5, 4, 3, 2, 1]]
    assert decay_weights(torch.ones(3, dtype=torch.bool), gamma=1.0).tolist() == pytest.approx(
        [1, math.exp(-1), math.exp(-2)]
    )


def test_loss_of_packed_documents_equals_one_per_row():
    """Same documents, same anchors: what else is in the row changes nothing."""
    target = random_target("float64")
    draft = random_draft(target)
    documents = random_documents(9, seed=5)
    losses = []
    for row_length in (100, 40):  # several documents a row, then one a row
        rows = (
            pack_documents(documents, row_length, pad_id=0)
            if row_length == 100
            else [pack_documents([d], row_length, pad_id=0)[0] for d in documents]
        )
        count = max(len(valid_anchors(row)) for row in rows)
        batch = make_batch(rows, num_anchors=count, block_size=draft.block_size, seeds=[(0,)] * len(rows))
        clean = target_pass(target, batch.input_ids, batch.position_ids, batch.document_ids, draft.split_layer)
        hidden = draft.forward_batch(clean.context, batch)
        total, weight, correct = block_loss(draft.logits, hidden, batch.labels, None, **OBJECTIVE)
        losses.append((float(total.detach()), float(weight), int(correct.sum())))
        documents_per_row = len(documents) / len(rows)
        assert documents_per_row > 2 or row_length == 40
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # logits are reduced in float32


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.integers(0, 2**31))
def test_accepted_drafts_equals_counting(predicted, seed):
    drafted = torch.randint(0, 4, (len(predicted),), generator=torch.Generator().manual_seed(seed)).tolist()
    count = 0
    while count < len(predicted) and drafted[count] == predicted[count]:
        count += 1
    assert int(accepted_drafts(torch.tensor(drafted), torch.tensor(predicted))) == count


def test_tau_counts_the_bonus_token():
    assert mean_acceptance_length([0, 0]) == 1.0
    assert mean_acceptance_length([7, 3]) == 6.0
    assert acceptance_by_slot([0, 1, 3, 3], block_size=4) == [0.75, 0.5, 0.5]
