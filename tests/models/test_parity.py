"""Central property: for the same state, training and decoding give the same logits."""

import pytest
import torch
from helpers.shared import random_documents, random_draft, random_target
from transformers import DynamicCache

from data.preprocess.anchors import make_batch, valid_anchors
from data.preprocess.packing import pack_documents
from models.decoding.reference import draft_logits
from models.draft import UNKNOWN
from models.hf_cache import forward_cached
from models.target import bonus_tokens, target_pass


def training_states(dtype: str, beyond: bool):
    """Return packed rows with all valid anchors, including the first and the last possible."""
    target = random_target(dtype)
    draft = random_draft(target, bonus_slot=beyond, chain_rank=4 if beyond else 0)
    rows = pack_documents(random_documents(8, seed=3), 96, pad_id=0)
    assert max(row.document_ids.max() for row in rows) >= 1  # several documents in a row
    count = max(len(valid_anchors(row)) for row in rows)
    batch = make_batch(rows, num_anchors=count, block_size=draft.block_size, seeds=[(i,) for i in range(len(rows))])
    return target, draft, rows, batch


@pytest.mark.slow(but="float32-0.0001-True")
@pytest.mark.parametrize("beyond", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-9)])
@torch.no_grad()
def test_training_and_decoding_logits_agree(dtype, tolerance, beyond):
    """In every state and drafting mode; `beyond` the paper, also with the bonus token in slot 0 and with the chain."""
    target, draft, rows, batch = training_states(dtype, beyond)
    clean = target_pass(target, batch, draft.split_layer)
    bonus = bonus_tokens(target, clean.hidden, batch.anchors)
    known, logits = bonus[..., None].expand(-1, -1, draft.block_size), {}
    for bonus_known in (False, True):
        hidden = draft.forward_batch(clean.context, batch, bonus=bonus if bonus_known else None)
        logits[bonus_known, False] = draft.logits(hidden)  # stage 1
        # Stage 2: slots are given the previous tokens that decoding would draft.
        calibrated = draft.logits(hidden, known)
        drafted = draft.block_logits(hidden[..., 1:, :], bonus).argmax(-1)
        before = torch.cat([torch.full_like(known[..., :1], UNKNOWN), known[..., :1], drafted[..., :-1]], -1)
        logits[bonus_known, True] = draft.logits(hidden, known, before) if beyond else calibrated

    states, worst = 0, 0.0
    for r, row in enumerate(rows):
        for a, anchor in enumerate(batch.anchors[r, : len(valid_anchors(row))].tolist()):
            document = row.document_ids == row.document_ids[anchor]
            start = int(document.argmax())
            prefix = torch.from_numpy(row.input_ids[start:anchor])[None]
            cache = DynamicCache()
            prediction = forward_cached(target, prefix, cache).logits[0, -1:].argmax(-1)
            assert prediction == bonus[r, a]  # training and decoding use the same bonus token
            for (bonus_known, calibrate), trained in logits.items():
                how = {"bonus_known": bonus_known, "calibrate": calibrate}
                decoded = draft_logits(draft, cache, anchor - start, prediction, **how)
                worst = max(worst, float((decoded - trained[r, a]).abs().max()))
                states += 1
    assert states >= 400  # at least 100 of each kind
    assert worst < tolerance
    assert float((logits[True, True] - logits[True, False]).abs().max()) > 0.1  # the calibrator has an effect
    assert (float((logits[True, True] - logits[False, True]).abs().max()) > 0.1) == beyond  # and the bonus slot
    assert not beyond or float((logits[True, True] - calibrated).abs().max()) > 0.1  # and the chain


@torch.no_grad()
def test_clean_context_is_the_targets_own_cache():
    """One document per row: neither mask tokens nor draft layers may affect the target's computation."""
    target = random_target()
    draft = random_draft(target)
    row = pack_documents(random_documents(1, seed=4, low=30, high=30), 30, pad_id=0)[0]
    batch = make_batch([row], num_anchors=4, block_size=draft.block_size, seeds=[(0,)])
    clean = target_pass(target, batch, draft.split_layer)
    draft.forward_batch(clean.context, batch)
    cache = DynamicCache()
    output = forward_cached(target.model, batch.input_ids, cache)
    assert torch.allclose(output.last_hidden_state, clean.hidden, atol=1e-5)
    for layer in range(draft.split_layer, target.config.num_hidden_layers):
        keys, values = clean.context[layer - draft.split_layer]
        assert torch.allclose(cache.layers[layer].keys, keys, atol=1e-5)
        assert torch.allclose(cache.layers[layer].values, values, atol=1e-5)
        assert keys.shape[2] == 30  # the blocks left no entries in the cache


@torch.no_grad()
def test_drafts_equal_a_plain_recomputation():
    """Recompute block logits with matrices and loops over heads, using only the weights of transformers' attention."""
    target = random_target("float64")
    draft = random_draft(target, rank=8)
    tokens = torch.randint(3, 97, (1, 17))
    cache = DynamicCache()
    forward_cached(target, tokens, cache)
    bonus = torch.tensor([5])
    got = draft_logits(draft, cache, 17, bonus)

    size, heads, kv_heads, head = draft.block_size, 4, 2, 8
    inv_freq = 10000.0 ** (-torch.arange(0, head, 2).double() / head)
    angles = torch.arange(17, 17 + size)[:, None].float() * inv_freq.float()
    cos, sin = (torch.cat([f(angles), f(angles)], -1).double() for f in (torch.cos, torch.sin))

    def norm(x, module):
        x = x.float()
        return module.weight * (x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()).double()

    def rotate(x):
        return x * cos + torch.cat([-x[:, head // 2 :], x[:, : head // 2]], -1) * sin

    h = draft.mask_embedding.expand(size, -1)
    for i, layer in enumerate(draft.layers):
        index, own, shared = draft.split_layer + i, layer.self_attn, target.model.layers[draft.split_layer + i]
        x = norm(h, shared.input_layernorm)
        q, k, v = ((x @ p.weight.T).view(size, -1, head) for p in (own.q_proj, own.k_proj, own.v_proj))
        out = torch.zeros(size, heads, head, dtype=torch.float64)
        for n in range(heads):
            m = n // (heads // kv_heads)
            keys = torch.cat([cache.layers[index].keys[0, m], rotate(norm(k[:, m], own.k_norm))])
            values = torch.cat([cache.layers[index].values[0, m], v[:, m]])
            scores = rotate(norm(q[:, n], own.q_norm)) @ keys.T / head**0.5
            out[:, n] = scores.softmax(-1) @ values
        h = h + out.reshape(size, -1) @ own.o_proj.weight.T
        x = norm(h, shared.post_attention_layernorm)
        gate = x @ shared.mlp.gate_proj.weight.T
        h = h + (gate * gate.sigmoid() * (x @ shared.mlp.up_proj.weight.T)) @ shared.mlp.down_proj.weight.T
    h = norm(h, target.model.norm)
    joined = torch.cat([target.get_input_embeddings()(bonus).expand(size, -1), h], -1)
    first, _, second = draft.anchor_bias_mlp
    inner = joined @ first.weight.T + first.bias
    expected = h @ target.lm_head.weight.T + (inner * inner.sigmoid()) @ second.weight.T + second.bias
    assert float((got - expected).abs().max()) < 1e-5  # the norms round to float32
