"""DFlash-like reference drafter: parity of training and decoding, no access to future tokens, lossless."""

import random
from contextlib import nullcontext, suppress
from dataclasses import replace

import pytest
import torch
from dflash_reference import Decoder, Reference, decode, train
from helpers.shared import random_documents, random_target

from data.preprocess.anchors import make_batch, valid_anchors
from data.preprocess.packing import pack_documents
from models.attention.packed import LayerStopped, View
from models.decoding.reference import autoregressive_generate
from models.loss.objectives import Objective

SIZE = 6


def reference(target, seed: int = 1) -> Reference:
    torch.manual_seed(seed)
    draft = Reference(target, num_layers=2, block_size=SIZE)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return draft


def packed(count: int = 6):
    rows = pack_documents(random_documents(count, seed=3), 96, pad_id=0)
    anchors = max(len(valid_anchors(row)) for row in rows)
    return rows, make_batch(rows, num_anchors=anchors, block_size=SIZE, seeds=[(i,) for i in range(len(rows))])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("float64", 1e-5)])  # norms round to float32
@torch.no_grad()
def test_training_and_decoding_logits_agree(dtype, tolerance):
    draft = reference(random_target(dtype))
    rows, batch = packed()
    logits, states, worst = draft.logits(draft.forward_batch(batch)), 0, 0.0
    for r, row in enumerate(rows):
        for a, anchor in list(enumerate(batch.anchors[r, : len(valid_anchors(row))].tolist()))[::3]:
            start = int((row.document_ids == row.document_ids[anchor]).argmax())
            decoder = Decoder(draft)
            decoder.verify(row.input_ids[start : anchor - 2].tolist() + [7])  # in pieces, with a rejected draft
            decoder.forget(max(0, anchor - 2 - start))
            decoder.verify(row.input_ids[max(start, anchor - 2) : anchor].tolist())
            at = torch.arange(anchor - start, anchor - start + SIZE)
            bonus = torch.tensor([[int(row.input_ids[anchor])]])
            decoded = draft.logits(draft(decoder.pairs, bonus, at[None, None]))[0, 0]
            worst, states = max(worst, float((decoded - logits[r, a]).abs().max())), states + 1
    assert states > 30 and worst < tolerance


@pytest.mark.slow
@torch.no_grad()
def test_a_block_sees_its_document_before_its_anchor_and_its_bonus_and_no_other_token():
    draft = reference(random_target())
    rows, batch = packed()
    r = next(r for r, row in enumerate(rows) if row.document_ids.max() >= 1)
    documents, before = batch.document_ids[r], draft.forward_batch(batch)[r]
    a = next(a for a, anchor in enumerate(batch.anchors[r].tolist()) if documents[anchor] == 1)
    anchor = int(batch.anchors[r, a])
    for place in range(documents.shape[0]):
        changed = batch.input_ids.clone()
        changed[r, place] = 3 + (changed[r, place] + 5) % 90
        after = draft.forward_batch(replace(batch, input_ids=changed))[r, a]
        may_see = documents[place] == documents[anchor] and place <= anchor
        assert torch.equal(after, before[a]) != may_see, place


def test_output_is_the_targets_own():
    target = random_target()
    draft, generator, accepted = reference(target), random.Random(2), []
    for _ in range(6):
        prompt = [generator.randrange(3, 97) for _ in range(generator.randint(1, 20))]
        tokens, steps = decode(draft, prompt, 12)
        assert tokens == autoregressive_generate(target, prompt, 12)
        accepted += steps
    assert accepted


@pytest.mark.slow
def test_drafts_that_are_right_are_kept_and_counted(monkeypatch):
    """A random drafter is never correct, so the drafts are the target's own answer up to a random position."""
    target, generator, counted = random_target(), random.Random(4), []
    draft, limit = reference(target), 16
    for _ in range(20):
        prompt = [generator.randrange(3, 97) for _ in range(generator.randint(1, 20))]
        monkeypatch.setattr(target.generation_config, "eos_token_id", -1)  # never stop: drafts continue past the end
        beyond, expected = autoregressive_generate(target, prompt, limit + SIZE), []
        stop = generator.choice([-1, beyond[generator.randrange(limit)]])
        end = beyond.index(stop) if stop in beyond[:limit] else limit - 1
        monkeypatch.setattr(target.generation_config, "eos_token_id", stop)

        def drafts(decoder, bonus, prompt=prompt, beyond=beyond, expected=expected, end=end):
            at, right = decoder.cache.get_seq_length() - len(prompt), generator.randrange(SIZE)
            assert beyond[at] == bonus and {pair[0].shape[2] for pair in decoder.pairs} == {len(prompt) + at}
            expected.append(min(right, end - at))
            return [token if i < right else (token + 1) % 97 for i, token in enumerate(beyond[at + 1 : at + SIZE])]

        monkeypatch.setattr(Decoder, "drafts", drafts)
        assert decode(draft, prompt, limit) == (beyond[: end + 1], expected)
        counted += expected
    assert set(counted) == set(range(SIZE))


@torch.no_grad()
def test_context_has_the_keys_and_values_of_the_layers_own_attention():
    draft, positions = reference(random_target()), torch.arange(7)[None] + 5
    features = torch.randn(1, 7, 3 * 32, generator=torch.Generator().manual_seed(6))
    fused = draft.hidden_norm(draft.fc(features))
    for layer, pair in zip(draft.layers, draft.context(features, positions), strict=True):
        view, rope = View(keep=True, stop=True), draft.target.model.rotary_emb(fused, positions)
        with suppress(LayerStopped):
            layer.self_attn(fused, position_embeddings=rope, attention_mask=view)
        torch.testing.assert_close(pair, view.kept)


def test_it_learns_and_the_target_does_not(tiny_target):
    before = {name: p.clone() for name, p in tiny_target.named_parameters()}
    torch.manual_seed(0)
    draft = Reference(tiny_target, num_layers=3, block_size=8)
    # Three layers, the fusion of three others, two norms, the mask embedding.
    assert sum(p.numel() for p in draft.parameters()) == 3 * 405_952 + 3 * 192**2 + 2 * 192 + 192 == 1_329_024
    row = [pack_documents(random_documents(4, seed=5), 96, pad_id=0)[0]]
    batch = make_batch(row, num_anchors=8, block_size=8, seeds=[(0,)])
    how = {"objective": Objective(), "chunk": 64, "learning_rate": 3e-3, "warmup_ratio": 0.04, "clip": 1.0}
    losses = train(draft, [batch] * 12, steps=12, autocast=nullcontext(), **how)
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in tiny_target.named_parameters())
