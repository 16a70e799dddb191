"""Arguments of the decoder; invalid ones are rejected by one ValueError before anything runs."""

import random

import numpy as np
import pytest
import torch
from helpers.decoding import guessing, padded, random_prompts
from helpers.shared import random_draft, random_target
from transformers import BatchEncoding

from models.decoding import flex as decoding
from models.decoding.flex import PARALLEL_ROWS, generate
from models.decoding.forward_passes import ForwardPasses
from models.decoding.sampling import Sampling
from models.decoding.selection import Selection

PROMPTS = [[5, 6, 7, 8], [9, 10]]
IDS, MASK = padded(PROMPTS, left=True)


class Nothing:
    """A target that must not run."""


@pytest.fixture(scope="module")
def pair():
    target = random_target()
    return target, random_draft(target)


WRONG = {
    "max_new_tokens=None": {"max_new_tokens": None},
    "max_new_tokens=5.0": {"max_new_tokens": 5.0},
    "max_new_tokens='5'": {"max_new_tokens": "5"},
    "max_new_tokens=True": {"max_new_tokens": True},
    "max_new_tokens=-3": {"max_new_tokens": -3},
    "input_ids is a str": {"input_ids": "Hello"},
    "input_ids is a dict": {"input_ids": {"input_ids": PROMPTS}},
    "input_ids is a BatchEncoding": {"input_ids": BatchEncoding({"input_ids": IDS})},
    "input_ids is a int": {"input_ids": 5},
    "input_ids is a NoneType": {"input_ids": None},
    "row 1 is a str": {"input_ids": [[5], "Hello"]},
    "row 0 is a dict": {"input_ids": [{"role": "user"}]},
    "row 0 is a float": {"input_ids": [5.0, 6.0]},
    "row 0 contains 5.5": {"input_ids": [[5.5]]},
    "row 0 contains '5'": {"input_ids": [["5"]]},
    "row 0 contains None": {"input_ids": [[None, 5]]},
    r"single prompt; expected a list of prompts, e\.g\. \[input_ids\]": {"input_ids": [5, 6]},
    r"shape \(2,\)": {"input_ids": torch.tensor([5, 6])},
    "dtype torch.float32": {"input_ids": IDS.float()},
    "attention_mask is a list": {"input_ids": IDS, "attention_mask": [[1, 1]]},
    "values other than 0": {"input_ids": IDS, "attention_mask": MASK * 2},
    "expected one of auto, parallel": {"mode": None},
    "selection='off'": {"selection": "off"},
    "sampling=0.7": {"sampling": 0.7},
    "seed=0.5": {"seed": 0.5},
    "seed=None": {"seed": None},
    r"seed=18446744073709551616": {"seed": 2**64},
    "seed: got 1 for 2 prompts": {"seed": [1]},
    r"seed=\['a', 'b'\]": {"seed": ["a", "b"]},
    "stop=270": {"stop": 270},
    "stop='</s>'": {"stop": "</s>"},
    r"stop=\{97\}": {"stop": {97}},
    r"stop=\[-1\]": {"stop": [-1]},
    r"stop=\[2.5\]": {"stop": [2.5]},
    "calibrate=None": {"calibrate": None},
    "parallel_rows=-1": {"parallel_rows": -1},
    "parallel_rows=1.5": {"parallel_rows": 1.5},
    "timer='slow'": {"timer": "slow"},
    "draft is a str": {"draft": "checkpoints/tiny/export"},
    "logits_processor: expected a list of functions .*, not a function": {
        "logits_processor": lambda ids, scores: scores
    },
    r"pass \[logits_processor\] \* 2": {"logits_processor": [lambda ids, scores: scores]},
    "one per prompt; got 1 for 2 prompts": {"logits_processor": [[lambda ids, scores: scores]]},
    "one per prompt; got 3 for 2 prompts": {"stopping_criteria": [[], None, []]},
    "got lists and functions mixed": {"stopping_criteria": [[], lambda ids, scores: False]},
    "5 is not callable": {"stopping_criteria": [[5], []]},
    r"stop_strings=\['a'\] requires the target's tokenizer": {"stop_strings": ["a"]},
    r"stop_strings=\[5\]": {"stop_strings": [5]},
    r"stop_strings=\[''\]": {"stop_strings": [""]},
    "streamer: got 1 for 2 prompts": {"streamer": Nothing()},
    r"expected an object with put\(ids\) and end\(\)": {"streamer": [Nothing(), None]},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_argument_is_rejected_before_anything_runs(message, pair, monkeypatch):
    target, draft = pair
    monkeypatch.setattr(decoding, "BatchDecoder", None)
    with pytest.raises(ValueError, match=message):
        generate(target, **{"draft": draft, "input_ids": PROMPTS, "max_new_tokens": 4} | WRONG[message])


@pytest.mark.parametrize("target", ["src/data/tiny/target", None, Nothing()])
def test_a_target_that_is_not_a_model_is_rejected(target):
    with pytest.raises(ValueError, match="Load it with load_target"):
        generate(target, None, PROMPTS, max_new_tokens=4)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (Sampling, {"temperature": "0.7"}),
        (Sampling, {"temperature": None}),
        (Sampling, {"top_k": 2.5}),
        (Sampling, {"top_k": float("inf")}),
        (Sampling, {"top_k": float("nan")}),
        (Sampling, {"top_p": "0.9"}),
        (Sampling, {"top_p": float("nan")}),
        (Selection, {"threshold": "0.1"}),
        (Selection, {"threshold": None}),
        (Selection, {"threshold": 5}),
        (Selection, {"rule": None}),
    ],
)
def test_settings_of_the_wrong_type_are_rejected_with_their_value(kind, arguments):
    name, value = next(iter(arguments.items()))
    with pytest.raises(ValueError, match=f"{'selection' if name == 'rule' else name}={value!r}"):
        kind(**arguments)


def test_prompts_may_be_any_sequence_of_integers(pair):
    target, draft = pair
    own = generate(target, None, PROMPTS, max_new_tokens=4).tokens
    arrays, tensors = [np.array(p) for p in PROMPTS], [torch.tensor(p) for p in PROMPTS]
    for prompts in (tuple(map(tuple, PROMPTS)), arrays, tensors, iter(PROMPTS)):
        assert generate(target, draft, prompts, max_new_tokens=np.int64(4), seed=np.int64(1)).tokens == own
    assert generate(target, draft, np.array(PROMPTS[:1]), max_new_tokens=4).tokens == own[:1]
    for stop in ([own[0][0]], (own[0][0],), frozenset({own[0][0]}), np.array([own[0][0]])):
        assert generate(target, draft, PROMPTS, max_new_tokens=4, stop=stop).tokens[0] == own[0][:1]


@pytest.mark.parametrize("left", [True, False])
def test_a_padded_tensor_without_a_mask_is_interpreted_as_in_transformers(left, pair):
    target, draft = pair
    assert target.generation_config.pad_token_id == 0
    prompts = random_prompts(random.Random(1), 4, 9)
    prompts = [[token or 1 for token in prompt] for prompt in prompts]
    ids, mask = padded(prompts, left=left)
    own = generate(target, None, prompts, max_new_tokens=5).tokens
    assert generate(target, draft, ids, max_new_tokens=5).tokens == own
    assert generate(target, draft, ids, mask, max_new_tokens=5).tokens == own
    if left:
        output = target.generate(ids, do_sample=False, max_new_tokens=5)[:, ids.shape[1] :].tolist()
        assert [row[: len(tokens)] for row, tokens in zip(output, own, strict=True)] == own
    with pytest.raises(ValueError, match="inferred from the padding token. has padding within a prompt"):
        generate(target, draft, torch.tensor([[5, 0, 6], [5, 6, 7]]), max_new_tokens=5)


def test_ambiguous_padding_requires_a_mask():
    target = random_target()
    target.generation_config.pad_token_id = 2  # which is a stop token
    ids, mask = padded(PROMPTS, left=True, filler=2)
    with pytest.raises(ValueError, match="stop token .one of .2.., which may be padding. Pass attention_mask"):
        generate(target, None, ids, max_new_tokens=4)
    own = generate(target, None, PROMPTS, max_new_tokens=4).tokens
    assert generate(target, None, ids, mask, max_new_tokens=4).tokens == own
    ends = torch.tensor([[2, 5, 2]])  # one row has no padding, so its stop tokens are text
    assert (
        generate(target, None, ends, max_new_tokens=4).tokens
        == generate(target, None, [[2, 5, 2]], max_new_tokens=4).tokens
    )


def test_a_target_with_more_embedding_rows_than_its_tokenizer_has_tokens_decodes():
    target = random_target()
    target.resize_token_embeddings(128, mean_resizing=False)
    draft = guessing(target)
    own = generate(target, None, PROMPTS, max_new_tokens=6).tokens
    for mode in ("parallel", "sequential"):
        assert generate(target, draft, PROMPTS, max_new_tokens=6, mode=mode).tokens == own


def test_auto_drafts_sequentially_on_a_cpu_and_in_parallel_for_few_rows_on_a_gpu(pair, monkeypatch):
    target, draft = pair
    calls = []
    for name in ("verify", "verify_and_draft"):
        real = getattr(ForwardPasses, name)
        monkeypatch.setattr(
            ForwardPasses, name, lambda *a, name=name, real=real, **k: calls.append(name) or real(*a, **k)
        )
    for rows in (1, 2, 5):
        generate(target, draft, PROMPTS[:1] * rows, max_new_tokens=5)
    assert set(calls) == {"verify"}
    calls.clear()
    generate(target, draft, PROMPTS[:1], max_new_tokens=5, parallel_rows=1)
    assert set(calls) == {"verify_and_draft"}
    assert decoding.rows_in_parallel(torch.device("cpu")) == 0
    assert decoding.rows_in_parallel(torch.device("cuda")) == PARALLEL_ROWS == 2
