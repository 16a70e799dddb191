"""The target's own output is that of `generate` in transformers, with the target's generation settings."""

import itertools
import random

import pytest
import torch
from helpers.decoding import SELECTIONS, endless, guessing, random_prompts, until
from helpers.shared import random_draft, random_target
from transformers import GenerationConfig, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from models.decoding.flex import MODES, check_untested, generate, stop_tokens
from models.decoding.generation_settings import (
    IGNORED,
    OVERRIDDEN,
    SPEEDUPS,
    SUPPORTED,
    active_settings,
    check_generation_config,
)
from models.decoding.reference import autoregressive_generate, reference_generate
from models.decoding.sampling import Sampling
from models.decoding.selection import OFF

NEW_TOKENS = 12
SETTINGS = {
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "suppress_tokens": [60, 43],
    "begin_suppress_tokens": [60, 30],
    "bad_words_ids": [[70], [60, 60]],
    "sequence_bias": [[[60], -20.0], [[43, 63], -50.0]],
    "min_new_tokens": 5,
    "min_length": 20,
    "forced_bos_token_id": 9,
    "forced_eos_token_id": 60,
    "exponential_decay_length_penalty": (4, 1.6),
    "encoder_repetition_penalty": 1.4,
    "encoder_no_repeat_ngram_size": 1,
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "eos_token_id": [2, 70, 43],
}
WITHOUT_CHANGE = {
    "do_sample": True,
    "temperature": 0.3,
    "top_k": 7,
    "top_p": 0.5,
    "max_length": 5,
    "prompt_lookup_num_tokens": 3,
    "length_penalty": 2.0,
    "no_setting_of_transformers": "a text",
}


def settled(**settings):
    """Return a predictable target with these default settings, and prompts of different lengths."""
    target = endless()
    target.generation_config = GenerationConfig(eos_token_id=60, pad_token_id=0)
    for name, value in settings.items():
        setattr(target.generation_config, name, value)
    return target, [*random_prompts(random.Random(3), 5, 20), [1]]


def of_transformers(target, prompts, new_tokens: int = NEW_TOKENS, **settings) -> list[list[int]]:
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        how = {"do_sample": False, "max_new_tokens": new_tokens} | settings
        output = target.generate(ids, attention_mask=torch.ones_like(ids), **how)
        answers.append(output[0, len(prompt) :].tolist())
    return answers


def every_way(target, prompts, new_tokens: int = NEW_TOKENS, **settings):
    """Decode with the target alone and by drafting in every mode, with a guessing and a random drafter."""
    drafts = (guessing(target), random_draft(target, bonus_slot=True, chain_rank=4))
    yield generate(target, None, prompts, max_new_tokens=new_tokens, **settings)
    for number, (draft, mode) in enumerate(itertools.product(drafts, MODES)):
        how = {"mode": mode, "parallel_rows": 2, "selection": SELECTIONS[number % 2]} | settings
        yield generate(target, draft, prompts, max_new_tokens=new_tokens, **how)


@pytest.mark.slow(but="[top_k]")
@pytest.mark.parametrize("name", [*SETTINGS, *WITHOUT_CHANGE, "all"])
def test_the_targets_generation_settings_are_applied_in_every_mode(name):
    given = SETTINGS | WITHOUT_CHANGE
    some = {key: given[key] for key in ("repetition_penalty", "suppress_tokens", "min_new_tokens", "eos_token_id")}
    target, prompts = settled(**(some if name == "all" else {name: given[name]}))
    own = of_transformers(target, prompts)
    assert all(result.tokens == own for result in every_way(target, prompts))
    assert [autoregressive_generate(target, prompt, NEW_TOKENS) for prompt in prompts] == own
    plain, _ = settled()
    changed = of_transformers(plain, prompts) != own
    assert changed == (
        name in SETTINGS and name not in ("remove_invalid_values", "renormalize_logits") or name == "all"
    )


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, top_k=40, top_p=0.95)], ids=["greedy", "sampled"])
def test_drafting_takes_the_steps_of_the_reference_under_generation_settings(sampling):
    target, prompts = settled(repetition_penalty=1.05, begin_suppress_tokens=[60, 30], eos_token_id=[16, 92])
    draft, accepted = guessing(target), set()
    for mode, selection in itertools.product(MODES, SELECTIONS):
        how = {"selection": selection, "sampling": sampling}
        result = generate(target, draft, prompts, max_new_tokens=NEW_TOKENS, seed=7, mode=mode, **how)
        expected = [reference_generate(target, draft, p, NEW_TOKENS, seed=7 + i, **how) for i, p in enumerate(prompts)]
        assert result.tokens == [alone.tokens[0] for alone in expected]
        assert result.steps == [alone.steps[0] for alone in expected]
        accepted |= set(result.accepted())
    assert len(accepted) > 2


@pytest.mark.slow
def test_a_neutral_penalty_has_no_effect():
    """Token-by-token selection gives the same output as selection from logits alone."""
    prompts = random_prompts(random.Random(4), 4, 20)
    target = endless()
    draft = guessing(target)
    for mode, sampling in itertools.product(MODES, (Sampling(), Sampling(0.8))):
        how = {"max_new_tokens": NEW_TOKENS, "mode": mode, "sampling": sampling, "seed": 5, "stop": {43}}
        target.generation_config.sequence_bias = None
        plain = generate(target, draft, prompts, **how)
        target.generation_config.sequence_bias = [[[1, 2, 3, 4, 5, 6, 7, 8], 0.5]]
        by_text = generate(target, draft, prompts, **how)
        assert (plain.tokens, plain.steps) == (by_text.tokens, by_text.steps)


@pytest.mark.slow
def test_given_stop_tokens_work_as_in_transformers():
    target, prompts = settled(min_new_tokens=4)
    for stop in ({70, 43}, set()):
        own = of_transformers(target, prompts, eos_token_id=sorted(stop) or None)
        assert all(result.tokens == own for result in every_way(target, prompts, stop=stop))


def test_a_target_without_stop_tokens_in_its_generation_settings_does_not_stop():
    target = random_target()
    target.generation_config.eos_token_id = None
    assert target.config.eos_token_id == 2 and stop_tokens(target) == set()
    target.generation_config.eos_token_id = torch.tensor([2, 5])
    assert stop_tokens(target) == {2, 5}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 3),
        ("num_return_sequences", 2),
        ("guidance_scale", 1.5),
        ("penalty_alpha", 0.6),
        ("dola_layers", "high"),
        ("token_healing", True),
        ("cache_implementation", "quantized"),
        ("stop_strings", ["a"]),
    ],
)
def test_unsupported_generation_settings_are_rejected_by_name(name, value):
    target, prompts = settled(**{name: value})
    for call in (
        lambda: generate(target, None, prompts, max_new_tokens=4),
        lambda: generate(target, random_draft(target), prompts, max_new_tokens=4),
        lambda: autoregressive_generate(target, prompts[0], 4),
        lambda: check_untested(target),
    ):
        with pytest.raises(ValueError, match=f"generation_config sets {name}="):
            call()
    setattr(target.generation_config, name, 1 if name.startswith("num") else None)
    check_generation_config(target)


@pytest.mark.parametrize(
    ("name", "value"), [("penalty_alpha", 1), ("penalty_alpha", 1.0), ("guidance_scale", 0), ("num_beam_groups", 0)]
)
def test_zero_and_one_disable_only_settings_with_that_default(name, value):
    target, _ = settled(**{name: value})
    with pytest.raises(ValueError, match=f"generation_config sets {name}="):
        check_generation_config(target)


def test_the_reported_settings_are_those_that_change_the_output():
    on = {
        "no_repeat_ngram_size": 1,
        "encoder_no_repeat_ngram_size": 1,
        "min_new_tokens": 1,
        "min_length": 1,
        "forced_bos_token_id": 0,
        "forced_eos_token_id": 1,
        "max_time": 1,
        "suppress_tokens": [1],
    }
    assert active_settings(settled(**on)[0]) == on
    off = {"repetition_penalty": 1, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_new_tokens": 0}
    off |= {"min_length": 0, "remove_invalid_values": False, "suppress_tokens": None}
    assert active_settings(settled(**off)[0]) == {} == active_settings(settled()[0])
    assert active_settings(settled(repetition_penalty=0)[0]) == {"repetition_penalty": 0}


def test_every_setting_of_transformers_is_classified_or_rejected():
    """A new setting is rejected until it is classified here."""
    lists = (SUPPORTED, OVERRIDDEN, SPEEDUPS, IGNORED)
    assert len(set().union(*lists)) == sum(map(len, lists))
    refused = set(GenerationConfig().to_dict()) - set().union(*lists)
    assert {"num_beams", "guidance_scale", "watermarking_config"} <= refused
    target = settled()[0]
    with pytest.MonkeyPatch.context() as patch:
        known = GenerationConfig().to_dict() | {"a_new_setting": None}
        patch.setattr(GenerationConfig, "to_dict", lambda self: known | vars(self))
        check_generation_config(target)
        target.generation_config.a_new_setting = 0.7
        with pytest.raises(ValueError, match="a_new_setting=0.7"):
            check_generation_config(target)


@pytest.mark.slow
def test_an_untested_architecture_may_have_generation_settings(monkeypatch):
    monkeypatch.setattr("models.decoding.flex.TESTED", ())
    for settings in ({"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 8}):
        target = random_target()
        for name, value in settings.items():
            setattr(target.generation_config, name, value)
        check_untested(target)


@pytest.mark.slow
def test_given_processors_are_merged_with_the_targets_own_as_in_transformers():
    target, prompts = settled(suppress_tokens=[60])
    extra = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.2)])
    own = of_transformers(target, prompts, logits_processor=extra)
    assert own != of_transformers(target, prompts)
    for result in every_way(target, prompts, logits_processor=[extra] * len(prompts)):
        assert result.tokens == own


class Once:
    """Processor that bans a row's last token and records the ids of each call."""

    def __init__(self):
        self.seen = []

    def __call__(self, ids, scores):
        self.seen.append(ids[0].tolist())
        return scores.index_fill(1, ids[0, -1:], float("-inf"))


@pytest.mark.slow
def test_a_processor_sees_each_new_token_of_its_row_once_and_in_order():
    target, prompts = settled()
    own = of_transformers(target, prompts, logits_processor=LogitsProcessorList([Once()]))
    for draft, mode in itertools.product((None, guessing(target)), MODES):
        given = [[Once()] for _ in prompts]
        how = {"mode": mode, "selection": OFF, "logits_processor": given}
        assert generate(target, draft, prompts, max_new_tokens=NEW_TOKENS, **how).tokens == own
        for prompt, answer, (processor,) in zip(prompts, own, given, strict=True):
            assert processor.seen == [prompt + answer[:number] for number in range(len(answer))]


@pytest.mark.slow
def test_stopping_criteria_end_only_their_own_row():
    target, prompts = settled(eos_token_id=None)
    free = of_transformers(target, prompts)
    limits = [3, 1, 7, NEW_TOKENS, 5, 2]
    given = [[lambda ids, scores, n=n, p=p: ids.shape[1] >= len(p) + n] for n, p in zip(limits, prompts, strict=True)]
    for result in every_way(target, prompts, stopping_criteria=given):
        assert result.tokens == [tokens[:limit] for tokens, limit in zip(free, limits, strict=True)]
    alone = generate(target, None, prompts[:1], max_new_tokens=NEW_TOKENS, stopping_criteria=given[0])
    assert alone.tokens == [free[0][:3]]


@pytest.mark.slow
def test_stop_strings_end_a_row_as_in_transformers(tiny_target, tiny_tokenizer):
    questions = ("Tom has 3 apples and buys 4 more. How many?", "Ann has 2 dogs. How many?", "What is 5 + 6?")
    chats = [[{"role": "user", "content": text}] for text in questions]
    prompts = [
        tiny_tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=True)["input_ids"] for c in chats
    ]
    how = {"stop_strings": ["<<", "is 1", "\n"], "tokenizer": tiny_tokenizer}
    own = of_transformers(tiny_target, prompts, 30, **how)
    free = of_transformers(tiny_target, prompts, 30)
    assert sum(a != b for a, b in zip(own, free, strict=True)) > 1
    for result in every_way(tiny_target, prompts, 30, **how):
        assert result.tokens == own
    assert (
        len(
            generate(tiny_target, None, prompts, max_new_tokens=30, stop_strings="zzz", tokenizer=tiny_tokenizer).tokens
        )
        == 3
    )


class RecordingStreamer:
    """Recording streamer with the interface of transformers."""

    def __init__(self):
        self.prompt, self.tokens, self.ended = None, [], 0

    def put(self, value):
        assert not self.ended and value.device.type == "cpu"
        if self.prompt is None:
            self.prompt = value.tolist()
        else:
            assert value.shape == (1,)
            self.tokens += value.tolist()

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("mode", MODES)
def test_streamers_receive_their_row_token_by_token_and_its_end(mode):
    target, prompts = settled(eos_token_id=[70, 43])
    for draft, settings in itertools.product(
        (None, guessing(target)), ({}, {"logits_processor": [[Once()] for _ in prompts]})
    ):
        streamers = [RecordingStreamer() for _ in prompts[:-1]] + [None]
        result = generate(target, draft, prompts, max_new_tokens=9, mode=mode, streamer=streamers, **settings)
        for streamer, prompt, tokens in zip(streamers[:-1], prompts, result.tokens, strict=False):
            assert (streamer.prompt, streamer.tokens, streamer.ended) == ([prompt], tokens, 1)
        assert len({len(tokens) for tokens in result.tokens}) > 1
    for new_tokens in (0, 1):
        one = RecordingStreamer()
        result = generate(target, None, prompts[:1], max_new_tokens=new_tokens, streamer=one)
        assert one.tokens == result.tokens[0] and len(one.tokens) == new_tokens and one.ended == 1


def test_a_text_streamer_of_transformers_prints_the_answer(tiny_target, tiny_tokenizer, capsys):
    from transformers import TextStreamer

    prompt = tiny_tokenizer("The total number of")["input_ids"]
    result = generate(
        tiny_target, None, [prompt], max_new_tokens=8, streamer=TextStreamer(tiny_tokenizer, skip_prompt=True)
    )
    assert capsys.readouterr().out.strip() == tiny_tokenizer.decode(until(result.tokens[0], set())).strip() != ""
