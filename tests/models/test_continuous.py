"""Continuous batching: every prompt gets its own answer, rows in flight are refilled, memory follows the lengths."""

import random

import pytest
import torch
from helpers.decoding import NUCLEUS, endless, guessing, own_batch, random_prompts, until

from models.decoding import continuous, kv_cache
from models.decoding.continuous import ContinuousDecoder
from models.decoding.draft_choice import RETRY, TRIAL, DraftChoice
from models.decoding.sampling import GREEDY


def decoded(decoder, prompts, seed=0, watch=lambda decoder: None):
    """Return the answers in order. `watch` is called after every step."""
    for number, prompt in enumerate(prompts):
        decoder.submit(number, prompt, seed + number)
    found = {}
    while decoder.active:
        found |= {number: row.tokens for number, row in decoder.step()}
        watch(decoder)
    return [found[number] for number in range(len(prompts))]


def groups(decoder):
    return [(group.capacity, len(group.needed)) for group in decoder._decoder.cache.groups]


@pytest.mark.parametrize(("parallel_rows", "sampling"), [(None, GREEDY), (0, NUCLEUS), (2, GREEDY), (9, NUCLEUS)])
def test_answers_do_not_depend_on_what_else_is_in_flight(parallel_rows, sampling, monkeypatch):
    monkeypatch.setattr(kv_cache, "SMALLEST", 8)  # rows of different lengths, which grow several times
    monkeypatch.setattr(continuous, "PREFILL_TOKENS_CPU", 40)
    target, prompts, seen, draws = endless(), random_prompts(random.Random(3), 10, 60), set(), random.Random(1)
    own = own_batch(target, prompts, 16, sampling, seed=5)
    stop = {own[0][10], own[3][12]}
    monkeypatch.setattr(DraftChoice, "choose", lambda choice, rows: draws.random() < 0.8)  # changes between steps
    draft = None if parallel_rows is None else guessing(target)
    how = {"max_rows": 4, "max_new_tokens": 16, "sampling": sampling, "stop": stop, "parallel_rows": parallel_rows or 0}
    decoder = ContinuousDecoder(target, draft, **how)
    answers = decoded(decoder, prompts, 5, lambda decoder: seen.add(tuple(groups(decoder))))
    assert answers == [until(tokens, stop) for tokens in own]
    assert decoder.new_tokens == sum(map(len, answers))
    assert max(map(len, seen)) > 1 and len(seen) > 8  # the rows were in several groups, and moved


def test_a_row_that_ends_makes_room_at_once():
    target, in_flight = endless(), []
    prompts = random_prompts(random.Random(4), 9, 12)
    first, second = own_batch(target, prompts[:2], 16)
    stop = {first[2], second[7]}  # some rows end early
    decoder = ContinuousDecoder(target, max_rows=3, max_new_tokens=16, stop=stop)
    answers = decoded(decoder, prompts, watch=lambda decoder: in_flight.append(len(decoder._in_flight)))
    steps = len(in_flight)
    assert max(in_flight) <= 3 and len({len(tokens) for tokens in answers}) > 1
    # The first step of a row gives two tokens. Batches wait for their longest answer.
    in_batches = sum(max(map(len, answers[start : start + 3])) - 1 for start in (0, 3, 6))
    assert steps < in_batches


def test_prompts_are_prefilled_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(continuous, "PREFILL_TOKENS_CPU", 10)
    target, tokens = endless(), []
    decoder = ContinuousDecoder(target, max_rows=8, max_new_tokens=6, stop=set())
    decoded(decoder, [[5] * 4] * 4 + [[6] * 30], watch=lambda decoder: tokens.append(decoder.new_tokens))
    assert tokens[:3] == [2, 2 * 2 + 2, 2 * 3 + 2 * 2 + 1]  # two prompts, two more, then the long one


def test_memory_follows_the_length_of_each_row():
    """One long row among short ones: padding all rows to the longest would take ten times as much."""
    target, entries = endless(max_position_embeddings=4096), []
    prompts = [[5] * 2900] + [[7, 8, 9]] * 11

    def allocated(decoder):
        cache = decoder._decoder.cache
        entries.append(sum(len(group.layers[0][0]) * group.capacity for group in cache.groups))

    decoder = ContinuousDecoder(target, max_rows=12, max_new_tokens=4, stop=set())
    answers = decoded(decoder, prompts, watch=allocated)
    assert all(len(tokens) == 4 for tokens in answers)
    assert 2900 + 11 * 7 <= max(entries) <= 4097 + 16 * kv_cache.SMALLEST < 12 * 2904 / 3


@pytest.mark.parametrize("cost", [2.0, 4.0])
def test_drafts_are_used_if_they_are_faster(cost):
    """A step with drafts takes `cost` seconds for three tokens, one without drafts a second for one token."""
    choice, used = DraftChoice(), []
    for step in range(4 * RETRY):
        if step == 2 * RETRY:
            cost = 6 - cost  # e.g. another program now uses the cores
        draft = choice.choose(8)
        choice.record(8, draft, 3 if draft else 1, cost if draft else 1.0)
        used.append(draft)
    halves = (used[: 2 * RETRY], used[2 * RETRY + 20 :])
    assert all(used[:TRIAL]) and not any(used[TRIAL : 2 * TRIAL])  # both are measured first
    usual = [sum(half) / len(half) for half in halves]
    assert min(usual) < 0.3 and max(usual) > 0.7
    assert (usual[0] > 0.5) == (cost == 4.0)
    assert choice.choose(3)  # other numbers of rows are measured separately


def test_invalid_prompts_are_rejected():
    decoder = ContinuousDecoder(endless(), max_rows=2, max_new_tokens=8)
    for prompt, message in (([], "empty"), ([10**6], "token id 1000000"), ([5] * 4000, "supports at most")):
        with pytest.raises(ValueError, match=message):
            decoder.submit("x", prompt)
    assert decoder.active == 0 and decoder.step() == []


@torch.no_grad()
def test_rows_that_move_keep_their_keys_and_values():
    """Rows are kept, dropped, moved to a larger group and joined by others at random; the reference is a list."""
    generator, draw = torch.Generator().manual_seed(0), random.Random(5)

    def new(lengths):
        packed = [tuple(torch.randn(1, 2, sum(lengths), 3, generator=generator) for _ in "kv") for _ in range(2)]
        cache = kv_cache.KVCache(packed, lengths, [n + 1 for n in lengths], [4, 8, 16, 32], slots=2)
        parts = [torch.cat([keys, values], -1)[0].split(lengths, 1) for keys, values in packed]
        return cache, list(zip(*parts, strict=True))

    def check(cache, rows):
        assert cache.rows == len(rows)
        for group in cache.groups:
            for at, row in enumerate(rows[group.rows]):
                for (keys, values), own in zip(group.layers, row, strict=True):
                    stored = torch.cat([keys, values], -1)[at, :, group.slots :]
                    assert torch.equal(stored[:, : own.shape[1]], own)
                    assert own.shape[1] < group.capacity and not stored[:, own.shape[1] :].any()

    cache, rows = new([1, 2, 9])
    for _ in range(60):
        check(cache, rows)
        kept = sorted(draw.sample(range(len(rows)), draw.randint(0 if len(rows) > 1 else 1, len(rows))))
        lengths = [rows[row][0].shape[1] for row in kept]
        order = cache.keep(kept, [min(32, n + 1) if draw.random() < 0.7 else min(32, 2 * n + 1) for n in lengths], 2)
        rows = [rows[row] for row in order]
        other, more = new(sorted(draw.randint(1, 20) for _ in range(draw.randint(1, 3))))
        order = cache.extend(other)
        rows = [(rows + more)[row] for row in order]
