"""A drafter cannot change the output, even with NaN, infinite or overflowing weights."""

import itertools
import random

import pytest
import torch
from helpers.decoding import NUCLEUS, SELECTIONS, endless, own_batch, padded, random_prompts
from helpers.shared import random_draft
from safetensors.torch import load_file, save_file

from models.custom_generate import generate as shipped
from models.decoding.flex import MODES, generate
from models.decoding.reference import reference_generate
from models.decoding.sampling import GREEDY
from models.decoding.selection import OFF, RULES, Selection, drafts_and_confidence
from models.export.artifact_io import export_draft

VALUES = (float("nan"), float("inf"), float("-inf"), 3e38)
BEYOND = {"bonus_slot": True, "chain_rank": 5}
NEW_TOKENS = 9
MODES_OF_BATCH = [("sequential", None), ("parallel", None), ("auto", 2)]  # and `parallel_rows` of auto


def target_of(dtype: str = "float32", family: str = "qwen3", **changes):
    return endless(dtype=dtype, model_type=family, num_hidden_layers=3, **changes)


def broken(target, value: float, *, only: str = "", share: float = 1.0, beyond: bool = True, seed: int = 0):
    """Return a drafter with `value` in a fraction of the elements of all tensors, or of those named like `only`."""
    draft = random_draft(target, num_layers=2, block_size=5, rank=6, **(BEYOND if beyond else {}))
    generator = torch.Generator().manual_seed(seed)
    hit = 0
    for name, parameter in draft.own_parameters().items():
        if only in name:
            parameter.masked_fill_(torch.rand(parameter.shape, generator=generator) < share, value)
            hit += 1
    assert hit
    return draft.requires_grad_(False)


def ragged(rows: int, seed: int = 0) -> list[list[int]]:
    """Return prompts of different lengths: shorter rows read cache entries past their own text."""
    prompts = random_prompts(random.Random(seed), rows, 24)
    return [prompt[: 1 + 3 * number] or prompt for number, prompt in enumerate(prompts)]


def check(target, draft, batch, *, sampling=GREEDY, selections=SELECTIONS, **changes):
    """Compare with the target alone. Samples in bfloat16 depend, through rounding, on the number of tokens in a pass:
    they are compared with a drafter of zeros, whose passes have the same shapes."""
    silent = broken(target, 0.0) if sampling is not GREEDY and target.dtype == torch.bfloat16 else None
    own = generate(target, None, batch, max_new_tokens=NEW_TOKENS, sampling=sampling, seed=3).tokens
    for (mode, rows), selection in itertools.product(MODES_OF_BATCH, selections):
        how = {"mode": mode, "selection": selection, "sampling": sampling, "seed": 3} | changes
        if rows is not None:
            how["parallel_rows"] = rows
        result = generate(target, draft, batch, max_new_tokens=NEW_TOKENS, **how)
        if silent:
            own = generate(target, silent, batch, max_new_tokens=NEW_TOKENS, **how).tokens
        assert result.tokens == own, (mode, selection)
        assert 1 <= result.tau < 2, (mode, selection)
    return own


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", VALUES)
@torch.no_grad()
def test_a_drafter_of_one_value_does_not_change_any_batch(value, dtype):
    target, ways = target_of(dtype), itertools.product((True, False), (GREEDY, NUCLEUS))
    drafts = {beyond: broken(target, value, beyond=beyond) for beyond in (True, False)}
    for rows, (beyond, sampling) in zip(range(1, 9), itertools.cycle(ways)):
        batch, selections = ragged(rows, seed=rows), SELECTIONS[rows % 3 :][:1]
        own = check(target, drafts[beyond], batch, sampling=sampling, selections=selections)
        assert dtype != "float32" or own[:2] == own_batch(target, batch[:2], NEW_TOKENS, sampling, seed=3)


@pytest.mark.slow
@torch.no_grad()
def test_a_partly_broken_tensor_does_not_change_the_output():
    target, batch = target_of(), ragged(4)
    names = list(random_draft(target, num_layers=2, block_size=5, rank=6, **BEYOND).own_parameters())
    assert len(names) > 15
    for number, (share, name) in enumerate(itertools.product((1.0, 0.02), [*names, "layers.0.", "layers.1."])):
        draft = broken(target, VALUES[number % len(VALUES)], only=name, share=share, seed=number)
        check(target, draft, batch, selections=(OFF,), calibrate=number % 3 != 0)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3", "qwen3_moe", "mistral"])
@torch.no_grad()
def test_broken_drafters_of_other_families_do_not_change_the_output(family):
    changes = {
        "gemma3_text": {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        "mistral": {"sliding_window": 8},
    }.get(family, {})
    target = target_of(family=family, **changes)
    for value in VALUES[:2]:
        check(target, broken(target, value), ragged(4), selections=(OFF,))


@pytest.mark.slow
@torch.no_grad()
def test_a_draft_on_which_the_target_overflows_does_not_affect_earlier_tokens():
    """Case of garbage in the embeddings of unused tokens: the drafter proposes such a token, the target never does."""
    target = endless()
    for value in VALUES[:3]:
        target.get_input_embeddings().weight[96] = value
        target.get_output_embeddings().weight[96] = 0.0
        draft = random_draft(target, num_layers=2, block_size=5, rank=6)
        draft.mask_embedding.fill_(1.0)
        draft.anchor_bias_mlp[2].bias[96] = 1e9
        batch = [[token % 96 for token in prompt] for prompt in ragged(5)]
        check(target, draft, batch, selections=(OFF,))
        assert generate(target, draft, batch, max_new_tokens=4, selection=OFF).tau == 1


@pytest.mark.slow
@pytest.mark.parametrize("value", VALUES)
@torch.no_grad()
def test_the_reference_takes_the_same_steps_with_a_broken_drafter(value):
    target, batch = target_of(), ragged(3)
    draft = broken(target, value)
    result = generate(target, draft, batch, max_new_tokens=NEW_TOKENS, mode="sequential")
    expected = [reference_generate(target, draft, prompt, NEW_TOKENS) for prompt in batch]
    assert result.tokens == [alone.tokens[0] for alone in expected]
    assert result.steps == [alone.steps[0] for alone in expected]


@pytest.mark.slow
@pytest.mark.parametrize("value", VALUES)
@torch.no_grad()
def test_the_shipped_decoders_output_is_not_changed_by_a_broken_drafter(value, tmp_path):
    target = target_of()
    target.generation_config.pad_token_id = 0
    export_draft(random_draft(target, num_layers=2, rank=6, **BEYOND), tmp_path / "drafter", torch.float32)
    weights = tmp_path / "drafter" / "model.safetensors"  # the export rejects such values
    save_file({name: torch.full_like(tensor, value) for name, tensor in load_file(weights).items()}, weights)
    batch = [[token or 1 for token in prompt] for prompt in ragged(4)]
    ids, mask = padded(batch, left=True)
    how = {"attention_mask": mask, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    own = target.generate(ids, **how)
    for rule in RULES:
        found = shipped.generate(target, input_ids=ids, drafter=str(tmp_path / "drafter"), selection=rule, **how)
        assert torch.equal(found, own)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selection_of_non_finite_drafts_stays_within_the_block(rule, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, 30, generator=generator).to(dtype)
    for row, value in enumerate(VALUES[:3]):
        logits[row, row] = value
        logits[3 + row, 1, 7] = value
    drafts, confidence = drafts_and_confidence(logits)
    assert drafts.min() >= 0 and drafts.max() < 30
    assert ((confidence >= 0) & (confidence <= 1 + 1e-6)).all()
    for threshold in (0.0, 0.3, 1.0):
        counts = Selection(rule, threshold).count(confidence)
        assert counts.min() >= 1 and counts.max() <= 4
        assert rule == "off" or threshold == 0 or counts[0] == 1  # a non-finite slot has confidence 0


def test_every_mode_is_covered():
    assert {mode for mode, _ in MODES_OF_BATCH} == set(MODES)
