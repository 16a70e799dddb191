"""Losslessness: the output is the target's own for every drafter and drafting mode."""

import functools
import itertools
import json
import random
from unittest import mock

import pytest
import torch
from helpers.decoding import NUCLEUS, SELECTIONS, endless, guessing, own_batch, padded, random_prompts, until
from helpers.shared import TINY, random_draft, random_target
from transformers import DynamicCache

from data.preprocess.chat_template import ChatEncoder
from data.sources.readers import read_strictly
from data.sources.records import prompt
from models.decoding.batch_decoder import BatchDecoder
from models.decoding.flex import MODES, PHASES, Step, generate, stop_tokens
from models.decoding.forward_passes import ForwardPasses
from models.decoding.reference import autoregressive_generate, reference_generate
from models.decoding.sampling import GREEDY, Sampling
from models.decoding.selection import OFF, Selection
from models.draft import DraftModel
from models.draft_config import DraftConfig
from models.export.artifact_io import load_draft
from models.hf_cache import forward_cached

NEW_TOKENS = 4
COMBINATIONS = list(itertools.product(MODES, SELECTIONS, range(1, 9)))  # with batch sizes
random.Random(0).shuffle(COMBINATIONS)  # so that every subset is a mix


@pytest.fixture(scope="module")
def prompts(tiny_tokenizer) -> list[list[int]]:
    messages = read_strictly(str(TINY / "prompts.jsonl"), prompt, split="test", limit=500, setting="data.prompts")
    encoder = ChatEncoder(tiny_tokenizer, {})
    prompts = [encoder.prompt(m) for m in messages]
    assert len(set(map(tuple, prompts))) == 500
    return prompts


@pytest.fixture(scope="module")
def own_answers(tiny_target, tiny_tokenizer, prompts) -> list[list[int]]:
    """Decode with `generate` of transformers, in padded batches of similar lengths."""
    answers, order = [[]] * len(prompts), sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for first in range(0, len(prompts), 25):
        batch = order[first : first + 25]
        ids, mask = padded([prompts[i] for i in batch], left=True)
        output = tiny_target.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0
        )
        for i, row in zip(batch, output[:, ids.shape[1] :].tolist(), strict=True):
            answers[i] = until(row, stop_tokens(tiny_target))
    return answers


def staggering(answers: list[list[int]]) -> set[int]:
    """Choose two stop tokens that end the answers at three or more different lengths, as late as possible."""

    def late(stop: set[int]) -> tuple[bool, int]:
        lengths = [len(until(answer, stop)) for answer in answers]
        return len(set(lengths)) > 2, sum(lengths)

    generated = sorted({token for answer in answers for token in answer})
    return max(map(set, itertools.combinations(generated, 2)), key=late)


def untrained(target) -> DraftModel:
    return DraftModel(
        target, DraftConfig(num_layers=target.config.num_hidden_layers - 2, block_size=8, calibrator_rank=8)
    )


def adversarial(target) -> DraftModel:
    """Return a drafter with random projectors and a strong random calibrator: drafts unrelated to the target."""
    return random_draft(target, num_layers=target.config.num_hidden_layers - 2, block_size=8, rank=8)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [("trained", 500), ("untrained", 80), ("adversarial", 80)])
def test_output_equals_the_targets_own_in_every_mode_rule_and_batch_size(
    kind, count, tiny_target, prompts, own_answers, request
):
    if kind == "trained":
        draft = load_draft(request.getfixturevalue("trained_run") / "export", tiny_target)
    else:
        draft = {"untrained": untrained, "adversarial": adversarial}[kind](tiny_target)
    accepted, met, first, combinations = 0, set(), 0, itertools.cycle(COMBINATIONS)
    while first < count:
        mode, selection, size = next(combinations)
        met.add((mode, selection, size))
        batch = slice(first, first + size)
        result = generate(tiny_target, draft, prompts[batch], max_new_tokens=NEW_TOKENS, mode=mode, selection=selection)
        assert result.tokens == own_answers[batch]
        accepted, first = accepted + sum(result.accepted()), first + size
    assert kind != "trained" or (met == set(COMBINATIONS) and accepted > 100)  # the test covers all combinations


@pytest.mark.slow(but="[qwen3]")
@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen2"])
def test_output_equals_the_targets_own_for_other_families(family):
    target = random_target(model_type=family)
    drafts = (untrained(target), adversarial(target), guessing(target))
    generator = random.Random(family)
    for number, (mode, selection) in enumerate(itertools.product(MODES, SELECTIONS)):
        batch = random_prompts(generator, generator.randint(1, 8), 30)
        arguments = {"max_new_tokens": 6, "mode": mode, "selection": selection}
        assert generate(target, drafts[number % 3], batch, **arguments).tokens == own_batch(target, batch, 6)


@pytest.mark.slow
def test_the_reference_loop_equals_generate_of_transformers(tiny_target, prompts):
    for tokens in prompts[:4]:
        output = tiny_target.generate(torch.tensor([tokens]), do_sample=False, max_new_tokens=15)
        assert autoregressive_generate(tiny_target, tokens, 15) == output[0, len(tokens) :].tolist()


def test_without_a_drafter_the_target_decodes_alone():
    target, batch = random_target(), random_prompts(random.Random(1), 4, 12)
    for sampling in (GREEDY, NUCLEUS):
        result = generate(target, None, batch, max_new_tokens=9, sampling=sampling)
        assert result.tokens == own_batch(target, batch, 9, sampling)
        assert set(result.accepted()) == {0} and result.tau == 1


@pytest.mark.slow(but="rule='off', threshold=0.01)-sampled")
@pytest.mark.parametrize("sampling", [GREEDY, NUCLEUS], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "selection", [*SELECTIONS, Selection("cumulative_product", 0.2), Selection("min_confidence", 0.6)], ids=str
)
def test_all_modes_take_the_steps_of_the_reference_in_any_batch(sampling, selection):
    target, limit = endless(), 13
    draft, batch = guessing(target), random_prompts(random.Random(3), 6, 20)
    free = own_batch(target, batch, limit, sampling, seed=7)
    target.generation_config.eos_token_id = sorted(staggering(free))
    common = {"selection": selection, "sampling": sampling}
    for calibrate in (True, False):
        expected = [
            reference_generate(target, draft, tokens, limit, calibrate=calibrate, seed=7 + row, **common)
            for row, tokens in enumerate(batch)
        ]
        for mode in MODES:
            settings = common | {"max_new_tokens": limit, "mode": mode, "calibrate": calibrate, "seed": 7}
            result = generate(target, draft, batch, **settings)
            assert result.tokens == [until(tokens, stop_tokens(target)) for tokens in free]
            assert result.tokens == [alone.tokens[0] for alone in expected]
            assert result.steps == [alone.steps[0] for alone in expected]
        if calibrate:
            assert len({len(tokens) for tokens in result.tokens}) > 2  # rows end one by one
            assert len(set(result.accepted())) > 2  # none, all and some in between


@pytest.mark.slow
def test_a_trained_drafter_takes_the_steps_of_the_reference(tiny_target, prompts, trained_run):
    draft = load_draft(trained_run / "export", tiny_target)
    expected = [reference_generate(tiny_target, draft, tokens, 20) for tokens in prompts[:4]]
    for mode in MODES:
        result = generate(tiny_target, draft, prompts[:4], max_new_tokens=20, mode=mode)
        assert result.tokens == [alone.tokens[0] for alone in expected]
        assert result.steps == [alone.steps[0] for alone in expected]
    assert sum(result.accepted()) > 3


class Echo(DraftModel):
    """Drafter that knows the answers. While all drafts are accepted, block n starts at token n*B."""

    def logits(self, hidden, bonus=None):
        known = [(answer + [0] * self.block_size)[self.drafted + 1 :][: self.block_size - 1] for answer in self.answers]
        self.drafted += self.block_size
        return torch.nn.functional.one_hot(torch.tensor(known), self.target.config.vocab_size).float()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["parallel", "sequential"])
@pytest.mark.parametrize(("limit", "last"), [(25, []), (22, [Step(3, 3)]), (20, [Step(1, 1)]), (19, [])])
def test_a_drafter_that_echoes_the_target_is_accepted_in_full(mode, limit, last):
    target, batch = endless(), random_prompts(random.Random(4), 3, 9)
    own = own_batch(target, batch, limit)
    echo = Echo(target, DraftConfig(num_layers=2, block_size=6, calibrator_rank=0))
    vars(echo).update(answers=own, drafted=0)
    result = generate(target, echo, batch, max_new_tokens=limit, mode=mode, selection=OFF)
    assert result.tokens == own
    full = [Step(5, 5)] * ((limit - 1) // 6 if not last else limit // 6)  # then a final bonus token, or less room
    assert result.steps == [full + last] * 3


@pytest.mark.slow
def test_random_prompts_limits_and_stop_tokens_never_give_a_wrong_token():
    targets = [endless(num_hidden_layers=2, max_position_embeddings=40, seed=seed) for seed in range(2)]
    generator, known = random.Random(5), {}
    for case in range(200):
        target = generator.choice(targets)
        draft = random_draft(target, num_layers=generator.randint(1, 2), block_size=generator.randint(2, 7), seed=case)
        if generator.random() < 0.7:
            draft = guessing(target, num_layers=generator.randint(1, 2), block_size=generator.randint(2, 7))
        limit = generator.choice([0, 1, 2, 3, 5, 9, 12])
        batch = random_prompts(generator, generator.randint(1, 6), generator.choice([1, 3, 40 - limit]))
        if generator.random() < 0.2:
            batch[0] = [generator.randrange(97) for _ in range(40 - limit)]  # to the last position
        sampling, seed = generator.choice([GREEDY, Sampling(0.8), Sampling(1.0, 20, 0.9)]), generator.randrange(99)
        free = own_batch(target, batch, limit, sampling, seed)
        # Tokens that will be generated: as the first one, the bonus token of a step, or within a block.
        generated = sorted({token for tokens in free for token in tokens}) or [2]
        stop = {generator.choice(generated) for _ in range(generator.randint(0, 3))}
        form = generator.choice(["lists", "left", "right"])
        given = (batch,) if form == "lists" else padded(batch, left=form == "left", filler=generator.choice([0, 96]))
        mode, selection = generator.choice(MODES), generator.choice(SELECTIONS)
        common = {"sampling": sampling, "seed": seed, "mode": mode, "selection": selection, "stop": stop}
        result = generate(target, draft, *given, max_new_tokens=limit, **common)
        assert result.tokens == [until(tokens, stop) for tokens in free], case
        for tokens, steps in zip(result.tokens, result.steps, strict=True):
            assert len(tokens) - sum(step.accepted + 1 for step in steps) in (
                0,
                1,
            )  # 1: a final bonus token, not verified
            assert all(0 <= step.accepted <= step.verified for step in steps)
            known[len(tokens) < limit] = known.get(len(tokens) < limit, 0) + 1
    assert min(known.values()) > 100 and len(known) == 2  # rows ended by a stop token, and others


def test_impossible_requests_are_rejected_with_their_value():
    target, ids = random_target(), torch.tensor([[5, 6, 7], [5, 6, 7]])
    draft, full = random_draft(target), [5] * 250
    refused = {
        "row 1 is empty": {"input_ids": [[5], []]},
        "input_ids is empty; expected at least one prompt": {"input_ids": []},
        "row 0 contains token id 97; token ids range from 0 to 96": {"input_ids": [[5, 97]]},
        "row 1 contains token id -1": {"input_ids": [[5], [-1]]},
        "max_new_tokens=-1": {"input_ids": [[5]], "max_new_tokens": -1},
        "250 tokens, 257 with max_new_tokens=7; the target supports at most 256": {
            "input_ids": [full],
            "max_new_tokens": 7,
        },
        "mode='both'": {"input_ids": [[5]], "mode": "both"},
        "padding within a prompt": {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 1]])},
        r"shape \(2, 2\)": {"input_ids": ids, "attention_mask": ids[:, :2]},
        r"shape \(3,\)": {"input_ids": ids[0]},
        "row 1 is empty;": {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])},
        "applies only to a padded tensor": {"input_ids": [[5]], "attention_mask": ids},
        "a different target": {"input_ids": [[5]], "draft": random_draft(random_target())},
    }
    for message, arguments in refused.items():
        with pytest.raises(ValueError, match=message):
            generate(target, **{"draft": draft, "max_new_tokens": 4} | arguments)
    assert len(generate(target, draft, [full], max_new_tokens=6, stop=set()).tokens[0]) == 6  # to the last position


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_the_cache_holds_the_targets_own_keys_and_values_of_all_committed_tokens(mode, monkeypatch):
    target, batch, checked = endless(), random_prompts(random.Random(6), 4, 15), []
    free = own_batch(target, batch, 14)
    step = BatchDecoder.step

    def checked_step(flight):
        step(flight)
        for place, row in enumerate(flight.rows):
            tokens, own = row.prompt + row.tokens, DynamicCache()
            forward_cached(target, torch.tensor([tokens]), own)
            assert flight.lengths[place] == len(tokens)
            (group,) = flight.cache.groups
            committed = slice(group.slots, group.slots + len(tokens))
            for (keys, values), layer in zip(group.layers, own.layers, strict=True):
                assert torch.allclose(keys[place, :, committed], layer.keys[0], atol=1e-4)
                assert torch.allclose(values[place, :, committed], layer.values[0], atol=1e-4)
            checked.append(len(flight.rows))

    monkeypatch.setattr(BatchDecoder, "step", checked_step)
    generate(target, guessing(target), batch, max_new_tokens=14, mode=mode, stop=staggering(free))
    assert len(checked) > 5 and len(set(checked) - {0}) > 2  # with all rows in flight, and after some have finished


def test_auto_drafts_in_parallel_when_few_rows_are_in_flight(monkeypatch):
    target, batch = endless(), random_prompts(random.Random(7), 4, 15)
    own = own_batch(target, batch, 12)
    draft, stop, calls, places = random_draft(target), staggering(own), [], []

    def counted(name, call, passes, candidates, *rest):
        calls.append((name, len(candidates)))
        places.append((len(candidates), passes.cache.slots))
        return call(passes, candidates, *rest)

    for name in ("verify", "verify_and_draft"):
        monkeypatch.setattr(
            ForwardPasses, name, functools.partialmethod(functools.partial(counted, name, vars(ForwardPasses)[name]))
        )
    generate(target, draft, batch, max_new_tokens=12, stop=stop, mode="sequential")
    in_flight = {rows for _, rows in calls}  # rows in flight, as rows finish
    assert len(in_flight) > 2 and {name for name, _ in calls} == {"verify"}
    for parallel_rows in (0, *in_flight, 9):
        calls.clear()
        result = generate(target, draft, batch, max_new_tokens=12, stop=stop, parallel_rows=parallel_rows)
        assert result.tokens == [until(tokens, stop) for tokens in own]
        assert {rows for _, rows in calls} == in_flight
        assert all((name == "verify_and_draft") == (rows <= parallel_rows) for name, rows in calls)
    few, many = ({n for rows, n in places if rows in group} for group in ({min(in_flight)}, {max(in_flight)}))
    assert max(few) - min(many) == draft.block_size * (draft.block_size - 1)  # for the blocks of parallel drafting
    places.clear()
    generate(target, draft, batch, max_new_tokens=12, stop=stop, parallel_rows=min(in_flight))
    assert min(n for rows, n in places if rows > min(in_flight)) == min(many)  # not before they can be used


def test_the_timer_wraps_every_phase():
    target, phases = random_target(), []
    batch = random_prompts(random.Random(8), 2, 9)

    def timer(name):
        phases.append(name)
        return mock.MagicMock()

    generate(target, random_draft(target), batch, max_new_tokens=6, mode="sequential", timer=timer, stop=set())
    assert set(phases) == set(PHASES) and phases[:3] == ["prefill", "draft", "calibrate"]
    assert phases.count("verify") + 1 == phases.count("draft") == phases.count("calibrate")


def test_drafters_and_targets_in_bfloat16_decode_in_all_modes():
    target = random_target("bfloat16")
    for mode in MODES:  # rounding may resolve ties differently: check only that it runs
        result = generate(target, random_draft(target), [[5, 6, 7], [8]], max_new_tokens=9, mode=mode, stop=set())
        assert [len(tokens) for tokens in result.tokens] == [9, 9]


def test_stop_tokens_of_the_embedded_target(tiny_target, tiny_tokenizer):
    assert stop_tokens(tiny_target) == {tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert json.loads((TINY / "target" / "generation_config.json").read_text())["eos_token_id"] == 2
