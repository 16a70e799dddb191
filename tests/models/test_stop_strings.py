"""A target whose generation_config has stop strings is trained, evaluated, verified and decoded like any other."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from helpers.decoding import guessing
from helpers.evaluation import HOW
from helpers.shared import SHORT, TINY, random_draft

from data.config.compose import composed
from data.preprocess.chat_template import ChatEncoder
from data.sources.readers import read_strictly
from data.sources.records import Conversation, questions
from models.decoding.flex import MODES, check_untested, generate
from models.decoding.reference import autoregressive_generate, reference_generate
from models.decoding.sampling import Sampling
from models.target import load_target, load_tokenizer
from models.verify.run import verify
from train.evaluate.acceptance import Variant
from train.evaluate.run import evaluate_drafter
from train.loop.validation_decoding import LiveDecoding
from train.pipeline import run
from train.run_dir.state import read_json

STRINGS = ["<<", "is 1", "\n"]
NEW_TOKENS = 20
FEW_STEPS = [
    f"stage.{stage}.{setting}"
    for stage in ("attention_tuning", "bonus_calibration")
    for setting in ("steps=2", "global_batch_size=2", "num_anchors=8", "decode.prompts=2", "decode.max_new_tokens=8")
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Save the embedded target with stop strings in its generation_config."""
    place = shutil.copytree(TINY / "target", tmp_path_factory.mktemp("stops") / "target")
    file = place / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"stop_strings": STRINGS}))
    return place


@pytest.fixture
def target(directory):
    return load_target(str(directory))


@pytest.fixture(scope="module")
def words(directory):
    return load_tokenizer(str(directory))


@pytest.fixture(scope="module")
def prompts(words):
    talks = read_strictly(str(TINY / "prompts.jsonl"), questions, split="test", limit=4, setting="x")
    return [ChatEncoder(words, {}).prompt(Conversation(talk.messages[:1])) for talk in talks]


def of_transformers(target, prompts, **settings):
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        how = {"do_sample": False, "max_new_tokens": NEW_TOKENS} | settings
        answers.append(target.generate(ids, attention_mask=torch.ones_like(ids), **how)[0, len(prompt) :].tolist())
    return answers


@pytest.mark.slow
def test_decoders_and_the_reference_stop_where_transformers_does(target, words, prompts):
    own = of_transformers(target, prompts, tokenizer=words)
    assert sum(len(answer) < NEW_TOKENS and answer[-1] != 2 for answer in own) > 1  # the strings ended some
    assert [autoregressive_generate(target, p, NEW_TOKENS, tokenizer=words) for p in prompts] == own
    draft = guessing(target)
    assert [reference_generate(target, draft, p, NEW_TOKENS, tokenizer=words).tokens[0] for p in prompts] == own
    for mode in MODES:
        assert generate(target, draft, prompts, max_new_tokens=NEW_TOKENS, mode=mode, tokenizer=words).tokens == own
    sampled = {"sampling": Sampling(0.8), "seed": 3, "tokenizer": words}
    alone = generate(target, None, prompts, max_new_tokens=NEW_TOKENS, **sampled).tokens
    assert generate(target, draft, prompts, max_new_tokens=NEW_TOKENS, **sampled).tokens == alone


def test_stop_strings_without_a_tokenizer_are_rejected_with_a_fix(target, prompts):
    for call in (
        lambda: check_untested(target),
        lambda: autoregressive_generate(target, prompts[0], 4),
        lambda: generate(target, None, prompts, max_new_tokens=4),
    ):
        with pytest.raises(ValueError, match="stop_strings=.* Pass tokenizer="):
            call()


def test_an_untested_architecture_may_have_stop_strings(target, words, monkeypatch):
    monkeypatch.setattr("models.decoding.flex.TESTED", ())
    check_untested(target, words)


def test_decoding_in_training_stops_where_the_target_does(target, words, prompts):
    draft = random_draft(target)
    limits = {"max_new_tokens": NEW_TOKENS, "batch_size": 2}
    by_prompt = LiveDecoding(prompts, tokenizer=words, **limits)._decode(draft, prompts)
    own = of_transformers(target, prompts, tokenizer=words)
    gained = [sum(accepted + 1 for accepted in steps) for steps in by_prompt]
    # The first token comes from the prompt; a step may gain the last token as a draft.
    assert all(len(answer) - 1 <= tokens <= len(answer) for tokens, answer in zip(gained, own, strict=True))


@pytest.mark.slow
def test_the_evaluation_compares_outputs_ended_by_stop_strings(target, words):
    talks = read_strictly(str(TINY / "prompts.jsonl"), questions, split="test", limit=3, setting="x")
    how = replace(HOW, max_new_tokens=NEW_TOKENS, tokenizer=words)
    variants = {"x": Variant(random_draft(target, num_layers=2), True)}
    speed = {"num_prompts": 1, "repeats": 1, "batch_sizes": [1], "thresholds": []}
    found = evaluate_drafter(target, variants, {"b": talks}, ChatEncoder(words, {}), how, speed, "t")
    report = found.benchmarks["b"]
    assert found.broken() is None and report.variants["x"].identical == report.prompts
    assert report.new_tokens < NEW_TOKENS * report.prompts
    assert found.as_dict()["generation_settings"] == {"stop_strings": STRINGS}


@pytest.mark.slow
def test_all_stages_and_models_verify_run(directory, tmp_path):
    few = ["stage.evaluate.num_prompts=2", "stage.evaluate.max_new_tokens=12", "stage.evaluate.speed.num_prompts=1"]
    config = composed([*SHORT, *FEW_STEPS, *few, f"model.target.name={directory}", f"run_dir={tmp_path}"])
    run(config)
    report = read_json(tmp_path / "evaluate" / "report.json")
    assert report["generation_settings"] == {"stop_strings": STRINGS}
    checks = list(verify(tmp_path / "export", directory, max_new_tokens=12))
    assert not any(check.faults for check in checks)
    assert checks[-1].name == "decoding" and "identical to the target's output under its generation_config" in (
        checks[-1].summary
    )
