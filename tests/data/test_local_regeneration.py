"""Regeneration in this process: answers of a drafter and of any batch size are the target's, progress in tokens."""

import io
import json
import shutil

import pytest
import torch
from helpers.shared import TINY, random_draft

from data.errors import UserError
from data.preprocess.chat_template import ChatEncoder
from data.regenerate import local_backend
from data.regenerate.conversation import Sample, Sampling
from data.regenerate.local_backend import LocalBackend
from data.regenerate.progress import Progress
from models.decoding.continuous import ContinuousDecoder
from models.export import export_draft
from models.target import load_target

QUESTIONS = ["Tom has 3 apples and buys 4 more. How many?", "What is 2+2?", "Ann has 2 dogs. How many legs?", "Why?"]


def backend(tokenizer, *, name=TINY / "target", draft=None, batch_size=2, **changes):
    target = {"name": str(name), "revision": None, "dtype": "float32"}
    how = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 16, "seed": 0, "drop_cut_off": False}
    sampling = Sampling(**how | {"repeat_words": 12, "repeat_times": 0} | changes)
    encoder = ChatEncoder(tokenizer, {})
    return LocalBackend(target, tokenizer, encoder, sampling, batch_size=batch_size, device="cpu", draft=draft)


def loaded(tokenizer, decoder):
    """Return a backend around a decoder, without loading the target again."""
    found = LocalBackend.__new__(LocalBackend)
    found.tokenizer, found.encoder, found.decoder = tokenizer, ChatEncoder(tokenizer, {}), decoder
    found.sampling, found.limit, found.ends = Sampling(0.0, 1.0, 9, 0, False, 9, 0), 100, {tokenizer.eos_token_id}
    return found


def answers(backend, questions, on_tokens=lambda count: None):
    """Answer conversations, given as lists of user turns. Return their answers' tokens by id."""
    asked = [
        Sample(str(number), [{"role": "user", "content": turn} for turn in turns])
        for number, turns in enumerate(questions)
    ]
    found = {}
    backend.run(asked, lambda s: found.update({s.id: s.token_ids}), answered_before=False, on_tokens=on_tokens)
    return found


@pytest.fixture(scope="module")
def drafter(tiny_target, tmp_path_factory):
    directory = tmp_path_factory.mktemp("drafter") / "export"
    export_draft(random_draft(tiny_target, num_layers=2, block_size=4), directory, torch.float32)
    return directory


@pytest.fixture
def short_answers(tiny_tokenizer, monkeypatch):
    """Let answers end at a frequent word, so that a conversation is continued: a cut-off answer ends it."""

    def load(*args, **options):
        target = load_target(*args, **options)
        words = tiny_tokenizer(" has is are of the . , =", add_special_tokens=False)["input_ids"]
        target.generation_config.eos_token_id = [tiny_tokenizer.eos_token_id, *words]
        return target

    monkeypatch.setattr(local_backend, "load_target", load)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.usefixtures("short_answers")
def test_answers_are_the_same_with_a_drafter_and_in_any_order(temperature, tiny_tokenizer, drafter):
    questions = [[QUESTIONS[0]], [QUESTIONS[1], QUESTIONS[2]], [QUESTIONS[3]]]
    alone = answers(backend(tiny_tokenizer, batch_size=1, temperature=temperature), questions)
    drafted = answers(backend(tiny_tokenizer, draft=str(drafter), batch_size=3, temperature=temperature), questions)
    assert alone == drafted and [len(ids) for ids in map(alone.get, "012")] == [1, 2, 1]
    # A resumed run asks only the questions that are left.
    left = backend(tiny_tokenizer, temperature=temperature)
    sample = Sample("2", [{"role": "user", "content": QUESTIONS[3]}])
    left.run([sample], lambda s: None, answered_before=True, on_tokens=lambda count: None)
    assert sample.token_ids == alone["2"]


def test_tokens_are_counted_while_answers_are_running(tiny_tokenizer):
    counts = []
    found = answers(backend(tiny_tokenizer), [[QUESTIONS[0]], [QUESTIONS[1]]], counts.append)
    assert sum(counts) == sum(len(ids) for sample in found.values() for ids in sample.values())
    assert len(counts) > 8 and max(counts) <= 6  # a few per step, not all at the end


def test_weights_are_stored_by_columns_without_changing_them(tiny_tokenizer, tiny_target):
    own = backend(tiny_tokenizer).target
    for (name, stored), loaded in zip(own.named_parameters(), tiny_target.parameters(), strict=True):
        assert torch.equal(stored, loaded)
        if "_proj" in name:
            assert stored.t().is_contiguous() and not stored.is_contiguous()


def test_a_damaged_or_foreign_drafter_is_refused(tiny_tokenizer, drafter, tmp_path):
    shutil.copytree(drafter, tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"x" * 300)
    shutil.copytree(drafter, tmp_path / "foreign")
    config = json.loads((tmp_path / "foreign" / "config.json").read_text())
    (tmp_path / "foreign" / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    for name, message in (
        ("damaged", "no safetensors header"),
        ("foreign", "trained for a target"),
        ("none", "no such"),
    ):
        with pytest.raises(UserError, match=rf"^regenerate\.draft=.*{name}: .*{message}"):
            backend(tiny_tokenizer, draft=str(tmp_path / name))


def test_a_target_that_cannot_be_decoded_is_refused_with_a_fix(tiny_tokenizer, tmp_path):
    shutil.copytree(TINY / "target", tmp_path / "target")
    file = tmp_path / "target" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"guidance_scale": 3.0}))
    with pytest.raises(UserError, match="guidance_scale=3.0.*regenerate.backend=server"):
        backend(tiny_tokenizer, name=tmp_path / "target")


@pytest.mark.parametrize(
    ("ends", "max_new_tokens", "complete"),
    [({"stop_strings": ["e"]}, 1, True), ({"stop_strings": ["e"]}, 9, True), ({"max_time": 0.0}, 9, False)],
)
def test_an_answer_is_complete_with_a_stop_string_of_the_target(
    ends, max_new_tokens, complete, tiny_tokenizer, tiny_target, monkeypatch
):
    for name, value in ends.items():
        monkeypatch.setattr(tiny_target.generation_config, name, value)
    how = {"max_rows": 1, "max_new_tokens": max_new_tokens, "tokenizer": tiny_tokenizer}
    decoder = ContinuousDecoder(tiny_target, **how)
    sample = Sample("1", [{"role": "user", "content": "Tom has 3 apples."}])
    loaded(tiny_tokenizer, decoder).run([sample], lambda _: None, answered_before=False, on_tokens=lambda _: None)
    assert sample.messages[1]["content"] == "The" and sample.written[1].truncated != complete


def test_tokens_beyond_the_vocabulary_are_a_refusal(tiny_tokenizer, tiny_target):
    local = loaded(tiny_tokenizer, ContinuousDecoder(tiny_target, max_rows=1, max_new_tokens=1))
    local.encoder.prompt = lambda _: [10**6]
    sample = Sample("1", [{"role": "user", "content": "?"}])
    local.run([sample], lambda _: None, answered_before=False, on_tokens=lambda _: None)
    assert sample.outcome.startswith("refused: ") and "1000000" in sample.outcome


def test_the_bar_shows_tokens_per_second_before_the_first_conversation_is_finished():
    shown = io.StringIO()
    clock = iter(range(100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.regenerate.progress.time.monotonic", lambda: next(clock))
        with Progress(10, 3, file=shown) as progress:
            progress.tokens(50)
            assert "3/10" in shown.getvalue() and "50 tokens, " in shown.getvalue().replace("\r", "\n")
            progress.finish(kept=False)
    assert "4/10" in shown.getvalue() and "1 dropped" in shown.getvalue()
