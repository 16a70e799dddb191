"""Prompts in documents have the tokens that they have alone, also in long texts without special tokens."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers

from data.preprocess import boundaries
from data.preprocess.boundaries import BoundaryTokenizer
from data.preprocess.spans import Answer, Rendered

PIECES = ("She has", " 12", "\n\n", "   ", " apples", "...", "é", " 水", "a" * 70, "!?", "\t", " the ", "🍎", "  \n ")


def long_text(generator: random.Random, turns: int) -> Rendered:
    """Return a conversation in the form `Q: ... A: ...`, in which tokens may straddle the start of an answer."""
    text, answers = "", []
    for turn in range(turns):
        start, words = generator.choice(["\nA:", "\nA: ", "A:\n"]), generator.choices(PIECES, k=12)
        text += "Q: " + "".join(generator.choices(PIECES, k=generator.randrange(30))) + start
        answers.append(
            Answer(2 * turn + 1, len(text), len(text) + len("".join(words)), len(text) + len("".join(words)))
        )
        text += "".join(words) + "\n"
    return Rendered(text, answers)


def sentencepiece_like() -> Tokenizer:
    """Return a tokenizer that merges across words, and puts a space in front: this changes all tokens of `aaa...`."""
    vocabulary = {piece: number for number, piece in enumerate(["?", "▁", "a", "aa", "aaaa", "▁a", "Q", "A", ":"])}
    merges = [("▁", "a"), ("a", "a"), ("aa", "aa")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="?", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


@pytest.mark.parametrize("window", [40, 400])
@pytest.mark.parametrize("kind", ["byte-level", "merging across words"])
def test_prompts_have_the_tokens_that_they_have_alone(kind, window, monkeypatch, tiny_tokenizer):
    backend = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend = backend if kind == "byte-level" else sentencepiece_like()
    monkeypatch.setattr(boundaries, "WINDOW", window)
    tokenizer = BoundaryTokenizer(backend)
    ends = []
    monkeypatch.setattr(tokenizer, "_end_alone", lambda *args: ends.append(end := boundaries_end(*args)) or end)

    def boundaries_end(*args):
        return BoundaryTokenizer._end_alone(tokenizer, *args)

    checked = 0
    for seed in range(20):
        text = long_text(random.Random(seed), 6)
        for found in tokenizer.documents([text]):
            for span in found.answers:
                (answer,) = (a for a in text.answers if a.turn == span.turn)
                prompt = backend.encode(text.text[: answer.start], add_special_tokens=False).ids
                assert found.document.input_ids[: span.start].tolist() == prompt
                checked += 1
    assert checked == 120
    assert any(end is not None for end in ends)
