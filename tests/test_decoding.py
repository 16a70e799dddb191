"""Lossless: whatever the drafter says, the output is the target's own."""

import json

import pytest
import torch
from conftest import TINY, random_draft, random_target

from data.chat import ChatEncoder
from data.records import prompt
from data.sources import read_strictly
from models.decoding import generate, stop_tokens
from models.draft import DraftModel
from models.export import load_draft
from models.reference_decoding import autoregressive_generate

NEW_TOKENS = 20


@pytest.fixture(scope="module")
def prompts(tiny_tokenizer) -> list[list[int]]:
    messages = read_strictly(str(TINY / "prompts.jsonl"), prompt, split="test", most=200, setting="data.prompts")
    assert len(messages) == 200
    encoder = ChatEncoder(tiny_tokenizer, {})
    return [encoder.prompt(m) for m in messages]


@pytest.fixture(scope="module")
def own_answers(tiny_target, prompts) -> list[list[int]]:
    return [autoregressive_generate(tiny_target, prompt, NEW_TOKENS) for prompt in prompts]


def untrained(target) -> DraftModel:
    return DraftModel(target, num_layers=6, block_size=8, calibrator_rank=8)


def adversarial(target) -> DraftModel:
    """Random projectors and a loud random calibrator: drafts that have nothing to do with the target."""
    return random_draft(target, num_layers=6, block_size=8, rank=8)


@pytest.mark.parametrize("kind", ["untrained", "adversarial", "trained"])
def test_output_equals_the_targets_own_on_200_prompts(kind, tiny_target, prompts, own_answers, trained_run):
    if kind == "trained":
        draft = load_draft(trained_run / "export", tiny_target)
    else:
        draft = {"untrained": untrained, "adversarial": adversarial}[kind](tiny_target)
    accepted = 0
    for tokens, own in zip(prompts, own_answers, strict=True):
        result = generate(tiny_target, draft, [tokens], max_new_tokens=NEW_TOKENS)
        assert result.tokens == own
        accepted += sum(result.accepted)
    assert accepted > 200 or kind != "trained"  # the trained one is no empty test


def test_own_loop_equals_transformers_generate(tiny_target, prompts, own_answers):
    for tokens, own in zip(prompts[:10], own_answers, strict=False):
        output = tiny_target.generate(torch.tensor([tokens]), do_sample=False, max_new_tokens=NEW_TOKENS)
        assert output[0, len(tokens) :].tolist() == own


class Echo(DraftModel):
    """A drafter that knows the answer: everything it drafts is accepted."""

    answer: list[int]

    def logits(self, hidden, bonus=None):
        logits = torch.zeros(self.block_size, self.target.config.vocab_size)
        for slot in range(self.block_size):
            at = self.anchor + slot
            logits[slot, self.answer[at] if at < len(self.answer) else 0] = 1.0
        return logits

    def forward(self, context, positions, attention_mask=None):
        self.anchor = int(positions[0, 0, 0]) - self.prompt_length
        return super().forward(context, positions, attention_mask)


def test_a_drafter_that_echoes_the_target_is_accepted_in_full():
    target = random_target()
    prompt = [5, 6, 7, 8]
    target.generation_config.eos_token_id = None
    target.config.eos_token_id = None
    own = autoregressive_generate(target, prompt, 31).tokens
    echo = Echo(target, num_layers=2, block_size=6, calibrator_rank=0)
    object.__setattr__(echo, "answer", own)
    object.__setattr__(echo, "prompt_length", len(prompt))
    result = speculative_generate(target, echo, prompt, 31)
    assert result.tokens == own
    assert result.accepted == [5, 5, 5, 5, 5, 0]  # 5 steps of 6 tokens, and one for the 31st
    assert result.tau == pytest.approx(31 / 6)


@pytest.mark.parametrize("limit", [0, 1, 2, 7])
def test_limits_and_stop_tokens_are_kept(limit):
    target = random_target()
    draft = random_draft(target)
    for seed in range(20):
        prompt = torch.randint(3, 97, (1 + seed % 5,), generator=torch.Generator().manual_seed(seed)).tolist()
        free = autoregressive_generate(target, prompt, 12).tokens
        for stop in {None, free[min(3, len(free) - 1)]}:  # a stop token in the middle of a block, too
            target.generation_config.eos_token_id = stop
            own = autoregressive_generate(target, prompt, limit).tokens
            result = speculative_generate(target, draft, prompt, limit)
            assert result.tokens == own
            assert len(result.tokens) <= limit
            assert len(result.tokens) - sum(a + 1 for a in result.accepted) in (0, 1)  # 1: a last bonus, not verified
            assert stop not in result.tokens[:-1]
        target.generation_config.eos_token_id = 2


def test_drafting_leaves_the_cache_as_it_was():
    from transformers import DynamicCache

    target = random_target()
    draft, cache = random_draft(target), DynamicCache()
    target(input_ids=torch.tensor([[5, 6, 7]]), past_key_values=cache, use_cache=True)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    draft_block(draft, cache, 3, torch.tensor([4]))
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)


def test_an_empty_prompt_is_refused():
    target = random_target()
    with pytest.raises(ValueError, match="prompt is empty"):
        speculative_generate(target, random_draft(target), [], 5)


def test_stop_tokens_of_the_embedded_target(tiny_target, tiny_tokenizer):
    assert stop_tokens(tiny_target) == {tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert json.loads((TINY / "target" / "generation_config.json").read_text())["eos_token_id"] == 2
