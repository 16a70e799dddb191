"""Losses and acceptance against slow references in float64."""

import math
from dataclasses import replace

import pytest
import torch
from helpers.shared import random_documents, random_draft, random_target
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batch import IGNORE, Batch
from data.preprocess.anchors import make_batch, valid_anchors
from data.preprocess.packing import pack_documents
from models.acceptance import acceptance_by_slot, accepted_drafts, mean_acceptance_length
from models.loss.block_loss import block_loss
from models.loss.objectives import Objective, decay_weights, dpace_weights
from models.target import target_pass

OBJECTIVES = {
    "ce, dpace": Objective(),
    "ce, decay": Objective(weights="decay"),
    "ce, flat": Objective(weights="flat"),
    "ce, cool": Objective(temperature=0.7),
    "kl": Objective(ce=0, kl=1),
    "tv": Objective(ce=0, tv=1),
    "tv, flat": Objective(ce=0, tv=1, weights="flat"),
    "mixture": Objective(ce=0.1, kl=0.3, tv=0.9, temperature=1.7),
}
ROWS, BLOCKS, SIZE, HIDDEN, VOCABULARY, LENGTH = 2, 5, 6, 8, 11, 40


def reference_value(z, t, label, objective):
    """Compute the loss of one slot and its acceptance probability from draft and target logits [V]."""
    log_q = torch.log_softmax(z / objective.temperature, 0)
    log_p = torch.log_softmax(t / objective.temperature, 0)
    cross_entropy = -log_q[label]
    divergence = sum(p.exp() * (p - q) for p, q in zip(log_p, log_q, strict=True))
    overlap = sum(torch.minimum(p.exp(), q.exp()) for p, q in zip(log_p, log_q, strict=True))
    value = objective.ce * cross_entropy + objective.kl * divergence + objective.tv * (1 - overlap)
    return value, float(overlap.detach() if objective.needs_target else torch.exp(-cross_entropy.detach()))


def reference_block_loss(hidden, target_hidden, head, batch, objective, slot0_loss):
    """Compute the loss one slot at a time. Losses are tensors for autograd; weights are plain numbers."""
    total, weight_total = 0.0, 0.0
    for row in range(ROWS):
        for block in range(BLOCKS):
            values, reach = [], []
            for slot in range(0 if slot0_loss else 1, SIZE):
                label = int(batch.labels[row, block, slot])
                if label == IGNORE:
                    break
                before = target_hidden[row, int(batch.anchors[row, block]) + slot - 1]
                value, confidence = reference_value(head @ hidden[row, block, slot], head @ before, label, objective)
                values.append(value)
                reach.append((1 - objective.alpha) * confidence + objective.alpha)
            for j, value in enumerate(values):
                if objective.weights == "dpace":
                    weight = sum(math.prod(reach[: m + 1]) for m in range(j, len(values)))
                else:
                    weight = math.exp(-j / objective.gamma) if objective.weights == "decay" else 1.0
                total = total + weight * value
                weight_total += weight
    return total, weight_total


def random_blocks(seed: int = 0):
    """Return draft and target hidden states, a head, and a batch with full, short and empty blocks, in float64."""
    torch.manual_seed(seed)
    hidden, target_hidden = torch.randn(ROWS, BLOCKS, SIZE, HIDDEN), torch.randn(ROWS, LENGTH, HIDDEN)
    labels = torch.randint(0, VOCABULARY, (ROWS, BLOCKS, SIZE))
    for block, length in enumerate([6, 2, 3, 0, 5]):
        labels[:, block, length:] = IGNORE
    tokens = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    anchors = torch.randint(1, LENGTH - SIZE, (ROWS, BLOCKS))
    head = torch.randn(VOCABULARY, HIDDEN)
    return hidden.double(), target_hidden.double(), head.double(), Batch(tokens, tokens, tokens, anchors, labels)


def relative_error(value, expected) -> float:
    return float((value.double() - expected).norm() / expected.norm())


@pytest.mark.slow(but="dtype1-1e-13-7-True")
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("slot0_loss", [False, True])
@pytest.mark.parametrize("chunk", [1000, 7])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_loss_and_gradients_equal_loops_in_float64(name, slot0_loss, chunk, dtype, tolerance):
    """In both stages: gradients of the hidden states and of the head's trained parameters."""
    hidden, target_hidden, head, batch = random_blocks()
    hidden.requires_grad_()
    head.requires_grad_()
    expected, expected_weight = reference_block_loss(
        hidden, target_hidden.detach(), head, batch, OBJECTIVES[name], slot0_loss
    )
    frozen = head.detach().to(dtype)
    settings = {"objective": OBJECTIVES[name], "chunk": chunk, "slot0_loss": slot0_loss}
    settings["target_hidden"] = target_hidden.to(dtype)

    own = hidden.detach().to(dtype).requires_grad_()
    loss, weight, correct = block_loss(lambda h, *_: h @ frozen.T, own, batch, **settings)
    (3 * loss).backward()  # a scale, as in training
    (by_hidden,) = torch.autograd.grad(expected, hidden, retain_graph=True)
    assert relative_error(loss.detach(), expected.detach()) < tolerance
    assert float(weight) == pytest.approx(expected_weight, rel=tolerance)
    assert relative_error(own.grad / 3, by_hidden) < tolerance
    hits = ((hidden @ head.T).argmax(-1) == batch.labels)[..., 1:]
    assert (correct == hits).all()

    # Stage 2 trains the full head here, so the teacher uses a separate one.
    change = torch.zeros_like(frozen).requires_grad_()
    bonus = torch.zeros(ROWS, BLOCKS, dtype=torch.long)

    def logits(hidden, bonus, previous):
        return hidden @ (frozen if bonus is None else frozen + change).T

    loss, _, _ = block_loss(logits, hidden.detach().to(dtype), batch, bonus=bonus, **settings)
    (3 * loss).backward()
    apart = head.detach().clone().requires_grad_()
    expected, _ = reference_by_draft_head(hidden.detach(), target_hidden, head.detach(), apart, batch, settings)
    (by_head,) = torch.autograd.grad(expected, apart)
    assert relative_error(change.grad / 3, by_head) < tolerance


def reference_by_draft_head(hidden, target_hidden, head, draft_head, batch, settings):
    """Run `reference_block_loss` with a separate draft head: logits replace the hidden states, and the head is 1."""
    eye = torch.eye(VOCABULARY, dtype=torch.float64)
    states = (hidden @ draft_head.T, target_hidden @ head.T)
    return reference_block_loss(*states, eye, batch, settings["objective"], settings["slot0_loss"])


def test_logits_are_computed_in_chunks_and_only_for_labelled_slots():
    hidden, _, head, batch = random_blocks()
    asked = []

    def logits(hidden, *_):
        asked.append(len(hidden))
        return hidden @ head.T

    block_loss(logits, hidden.requires_grad_(), batch, objective=Objective(), chunk=12)
    assert max(asked) <= 12 and sum(asked) == int((batch.labels[..., 1:] != IGNORE).sum())


def test_the_number_of_head_calls_does_not_depend_on_the_labels():
    """Under ZeRO 3 each call is a collective: ranks with different numbers of calls would deadlock."""
    hidden, _, head, batch = random_blocks()
    calls = []

    def logits(hidden, *_):
        calls[-1] += 1
        return hidden @ head.T

    for length in (0, 1, 6):
        calls.append(0)
        labels = torch.where(torch.arange(SIZE) < length, 1, IGNORE).expand(ROWS, BLOCKS, SIZE)
        changed = replace(batch, labels=labels, lengths=())
        block_loss(logits, hidden.clone().requires_grad_(), changed, objective=Objective(), chunk=12)
    assert calls == [5, 5, 5]  # 10 blocks of 5 slots, 2 at a time


def test_dpace_weights_decrease_over_slots_and_are_detached():
    confidence = torch.rand(20, 7, requires_grad=True)
    weights = dpace_weights(confidence, torch.ones(20, 7, dtype=torch.bool), alpha=0.5)
    assert not weights.requires_grad and (weights.diff(dim=-1) < 0).all()
    sure = dpace_weights(torch.ones(1, 7), torch.ones(1, 7, dtype=torch.bool), alpha=0.5)
    assert sure.tolist() == [[7, 6, 5, 4, 3, 2, 1]]
    assert decay_weights(torch.ones(3, dtype=torch.bool), gamma=1.0).tolist() == pytest.approx(
        [1, math.exp(-1), math.exp(-2)]
    )


def test_loss_of_packed_documents_equals_one_per_row():
    """Same documents and anchors: the other contents of a row have no effect."""
    target = random_target("float64")
    draft = random_draft(target)
    documents = random_documents(9, seed=5)
    losses = []
    for max_seq_len in (100, 40):  # several documents per row, then one per row
        rows = (
            pack_documents(documents, max_seq_len, pad_id=0)
            if max_seq_len == 100
            else [pack_documents([d], max_seq_len, pad_id=0)[0] for d in documents]
        )
        count = max(len(valid_anchors(row)) for row in rows)
        batch = make_batch(rows, num_anchors=count, block_size=draft.block_size, seeds=[(0,)] * len(rows))
        clean = target_pass(target, batch, draft.split_layer)
        hidden = draft.forward_batch(clean.context, batch)
        total, weight, correct = block_loss(draft.logits, hidden, batch, objective=Objective(), chunk=10_000)
        losses.append((float(total.detach()), float(weight), int(correct.sum())))
        documents_per_row = len(documents) / len(rows)
        assert documents_per_row > 2 or max_seq_len == 40
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
