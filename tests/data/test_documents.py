"""Records to packed rows: no token is lost or added, and rows are independent of the number of processes."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batch import IGNORE
from data.errors import UserError
from data.preprocess import table
from data.preprocess import tokenized as documents
from data.preprocess.anchors import block_labels, valid_anchors
from data.preprocess.chat_template import ChatEncoder
from data.preprocess.document import Document
from data.preprocess.packing import best_fit, pack_documents
from data.preprocess.prepare import describe, describe_answers, prepare
from data.preprocess.tokenized import TokenizeSettings, tokenize
from data.sources.readers import open_sources
from data.sources.records import Conversation


def turns(count, words=8, name=""):
    text = f"{name} " + "word " * words
    return [
        m for _ in range(count) for m in ({"role": "user", "content": text}, {"role": "assistant", "content": text})
    ]


def write(path, *conversations):
    path.write_text("".join(json.dumps({"messages": c}) + "\n" for c in conversations), encoding="utf-8")
    return str(path)


def read(path, tokenizer, *, num_proc=1, max_seq_len=256, truncation="turn", template_kwargs=None):
    sources = open_sources(path, split="train", max_records=None)
    encoder = ChatEncoder(tokenizer, template_kwargs or {})
    return tokenize(
        sources, encoder, TokenizeSettings(max_seq_len=max_seq_len, truncation=truncation), num_proc=num_proc
    ), encoder


def rows_of(path, tokenizer, *, num_proc):
    return prepare(
        open_sources(path, split="train", max_records=None), ChatEncoder(tokenizer, {}), max_seq_len=256,
        truncation="turn", bad_records="skip", num_proc=num_proc, validation_records=20, block_size=4, seed=3,
        rejects=Path(path).with_suffix(".rejects"),
    )  # fmt: skip


def as_bytes(rows):
    return [b"".join(getattr(row, name).tobytes() for name in vars(row)) for row in rows]


def test_rows_do_not_depend_on_the_number_of_processes(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("data.sources.jsonl.CHUNK_RECORDS", 32)
    path = write(tmp_path / "data.jsonl", *(turns(1 + i % 3, words=i % 40, name=str(i)) for i in range(300)), [])
    found = []
    for num_proc in (1, 2):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / f"cache{num_proc}")
        prepared = rows_of(path, tiny_tokenizer, num_proc=num_proc)
        files = list((tmp_path / f"cache{num_proc}").rglob("documents*.arrow"))
        assert len(files) == num_proc  # one per process
        found.append((as_bytes(prepared.training), as_bytes(prepared.validation), list(prepared.documents.rejects())))
    assert found[0] == found[1]
    assert len(found[0][0]) > 50 and len(found[0][2]) == 1


def test_the_cache_is_reused_unless_an_input_changes(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = write(tmp_path / "data.jsonl", *(turns(1, name=str(i)) for i in range(5)))
    writes = []
    original = documents._write
    monkeypatch.setattr(documents, "_write", lambda *args: writes.append(1) or original(*args))
    first, encoder = read(path, tiny_tokenizer)
    moved = write(tmp_path / "moved.jsonl", *(turns(1, name=str(i)) for i in range(5)))
    before = len(writes)
    for again in (read(path, tiny_tokenizer, num_proc=2)[0], read(moved, tiny_tokenizer)[0]):
        assert [d.input_ids.tolist() for d in again] == [d.input_ids.tolist() for d in first]
    assert len(writes) == before == 1
    for change in (
        {"max_seq_len": 255},
        {"truncation": "drop"},
        {"template_kwargs": {"x": False}},
        {"template_kwargs": {"x": "False"}},  # truthy in a template
    ):
        before = len(writes)
        read(path, tiny_tokenizer, **change)
        assert len(writes) > before, change
    before = len(writes)
    read(write(tmp_path / "data.jsonl", turns(1, name="other")), tiny_tokenizer)
    assert len(writes) > before
    monkeypatch.setattr(tiny_tokenizer, "chat_template", tiny_tokenizer.chat_template + " ")
    before = len(writes)
    read(path, tiny_tokenizer)
    assert len(writes) > before


def test_an_interrupted_tokenization_is_not_taken_for_complete(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("data.sources.jsonl.CHUNK_RECORDS", 2)
    path = write(tmp_path / "data.jsonl", *(turns(1, name=str(i)) for i in range(5)))
    with monkeypatch.context() as patch:
        patch.setattr(table, "fit_to_row", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            read(path, tiny_tokenizer)
    assert len(read(path, tiny_tokenizer)[0]) == 5


def input_ids(encoder, messages):
    (only,) = encoder.documents(Conversation(messages))
    return only.document.input_ids


def test_long_conversations_are_truncated_or_dropped(tmp_path, tiny_tokenizer):
    short, long, oversized = turns(1), turns(6), turns(1, words=300)
    path = write(tmp_path / "data.jsonl", short, long, oversized)
    encoder = ChatEncoder(tiny_tokenizer, {})
    full = [input_ids(encoder, c) for c in (short, long, oversized)]
    fits = max(n for n in range(1, 6) if len(input_ids(encoder, turns(n))) <= 100)
    assert 1 <= fits < 6
    cut, _ = read(path, tiny_tokenizer, max_seq_len=100)
    assert [d.input_ids.tolist() for d in cut] == [input_ids(encoder, turns(n)).tolist() for n in (1, fits)]
    assert cut.outcomes() == {"kept": 1, "truncated": 1, "too long": 1, "no anchor": 0, "bad": 0}
    assert cut.column("tokens").tolist() == [len(full[0]), len(full[1])]  # before truncation
    anywhere, _ = read(path, tiny_tokenizer, max_seq_len=100, truncation="token")
    # The first 100 tokens of the third conversation are all question: no anchor.
    assert [d.input_ids.tolist() for d in anywhere] == [tokens[:100].tolist() for tokens in full[:2]]
    assert anywhere.outcomes() == {"kept": 1, "truncated": 1, "too long": 0, "no anchor": 1, "bad": 0}
    dropped, _ = read(path, tiny_tokenizer, max_seq_len=100, truncation="drop")
    assert dropped.outcomes() == {"kept": 1, "truncated": 0, "too long": 2, "no anchor": 0, "bad": 0}


def test_each_answer_that_fits_is_kept_even_if_an_earlier_one_is_too_long(tmp_path, tiny_tokenizer, monkeypatch):
    """Qwen3's template drops the reasoning of an answer if another turn follows: each answer has its own document."""
    template = (Path(__file__).parents[1] / "templates" / "qwen3.jinja").read_text()
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    answers = [
        "a b c",
        "<think>\n" + "x " * 200 + "\n</think>\n\na b c",
        "d e f",
        "<think>\n" + "y " * 200 + "\n</think>\n\nd",
    ]
    messages = [m for a in answers for m in ({"role": "user", "content": "q"}, {"role": "assistant", "content": a})]
    path = write(tmp_path / "data.jsonl", messages, turns(1))
    cut, encoder = read(path, tiny_tokenizer, max_seq_len=150)
    lengths = [len(document.document.input_ids) for document in encoder.documents(Conversation(messages))]
    assert lengths[0] <= 150 < lengths[1] and lengths[2] <= 150 < lengths[3]
    assert [len(d.input_ids) for d in cut][:2] == [lengths[0], lengths[2]]
    assert cut.outcomes()["truncated"] == cut.outcomes()["kept"] == 1 and cut.records.tolist() == [0, 0, 1]
    assert cut.lost_tokens() == (lengths[1] + lengths[3], 0)
    counts = cut.answers()
    assert (counts["answers"], counts["supervised"], counts["separate"], counts["refused"]) == (5, 3, 1, 0)
    dropped, _ = read(path, tiny_tokenizer, max_seq_len=150, truncation="drop")
    assert dropped.outcomes()["too long"] == 1 and len(dropped) == 1
    assert dropped.lost_tokens() == (0, sum(lengths))


def test_documents_of_a_conversation_are_all_in_training_or_all_in_validation(tmp_path, tiny_tokenizer, monkeypatch):
    template = (Path(__file__).parents[1] / "templates" / "qwen3.jinja").read_text()
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    path = write(tmp_path / "data.jsonl", *(turns(1 + i % 3, name=f"number{i}") for i in range(40)))
    prepared = rows_of(path, tiny_tokenizer, num_proc=1)
    sets = [
        {tiny_tokenizer.decode(document.input_ids).split()[1] for document in rows.documents}
        for rows in (prepared.training, prepared.validation)
    ]
    assert [len(names) for names in sets] == [20, 20] and not sets[0] & sets[1]
    assert len(prepared.documents) == sum(1 + i % 3 for i in range(40))


def test_refused_answers_are_listed_and_the_others_kept(tmp_path, tiny_tokenizer, monkeypatch):
    """The prompt opens a reasoning block, so an answer without reasoning is not what decoding would produce."""
    template = (Path(__file__).parent / "templates" / "qwq.jinja").read_text()
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    answers = ["a b c", "<think>\nx y\n</think>\n\nd e f"]
    mixed = [m for a in answers for m in ({"role": "user", "content": "q"}, {"role": "assistant", "content": a})]
    path = write(tmp_path / "data.jsonl", mixed, mixed[:2], *[mixed] * 30)
    prepared = rows_of(path, tiny_tokenizer, num_proc=1)
    assert prepared.documents.outcomes()["kept"] == 31 and prepared.documents.outcomes()["bad"] == 1
    assert prepared.documents.answers()["refused"] == 32
    listed = [json.loads(line) for line in prepared.rejects.read_text().splitlines()]
    assert len(listed) == 32 and all(entry["reason"].startswith("turn 2: the prompt opens") for entry in listed)
    assert f"(31 kept, 1 bad, 32 answers refused, listed in {prepared.rejects})" in describe(prepared)
    assert describe_answers(prepared.documents) == (
        "63 answers: 31 supervised in the first document of a conversation, 32 refused."
    )


def test_data_without_a_usable_conversation_is_an_error(tmp_path, tiny_tokenizer):
    path = write(tmp_path / "data.jsonl", turns(1, words=300))
    with pytest.raises(UserError, match="no conversations to train on .*1 too long.*data.truncation"):
        rows_of(path, tiny_tokenizer, num_proc=1)


DOCUMENTS = st.lists(st.lists(st.booleans(), min_size=3, max_size=20).filter(lambda s: any(s)), min_size=1, max_size=30)


@given(masks=DOCUMENTS, max_seq_len=st.integers(20, 50))
@settings(max_examples=150, deadline=None)
def test_packing_preserves_all_documents(masks, max_seq_len):
    """The rows contain every document once, intact, with its supervision, position ids and document id."""
    token = iter(range(1, 10_000))
    originals = [Document(np.array([next(token) for _ in m], np.int32), np.array(m)) for m in masks]
    rows, unpacked = pack_documents(originals, max_seq_len, pad_id=0), []
    for row in rows:
        real = row.document_ids >= 0
        assert (row.input_ids[~real] == 0).all() and not row.supervised[~real].any()
        for number in range(row.document_ids.max() + 1):
            here = np.flatnonzero(row.document_ids == number)
            assert (np.diff(here) == 1).all() and (row.position_ids[here] == np.arange(len(here))).all()
            unpacked.append((row.input_ids[here].tolist(), row.supervised[here].tolist()))
    assert sorted(unpacked) == sorted((d.input_ids.tolist(), d.supervised.tolist()) for d in originals)
    assert rows.efficiency() == sum(map(len, masks)) / (len(rows) * max_seq_len)


@given(masks=DOCUMENTS, max_seq_len=st.integers(20, 50), block_size=st.integers(2, 8))
@settings(max_examples=100, deadline=None)
def test_no_block_crosses_a_document_or_an_unsupervised_token(masks, max_seq_len, block_size):
    originals = [Document(np.arange(len(m), dtype=np.int32) + 1, np.array(m)) for m in masks]
    for row in pack_documents(originals, max_seq_len, pad_id=0):
        anchors = valid_anchors(row)
        for anchor, labels in zip(anchors, block_labels(row, anchors, block_size), strict=True):
            stopped = False
            for slot, label in enumerate(labels.tolist()):
                at = anchor + slot
                inside = at < max_seq_len and row.document_ids[at] == row.document_ids[anchor] and row.supervised[at]
                stopped = stopped or not inside  # the first such token ends the block
                assert label == (IGNORE if stopped else row.input_ids[at])
        expected = [  # supervised, followed by a supervised token of the same document, not the document's first token
            i
            for i in range(max_seq_len - 1)
            if row.supervised[i] and row.supervised[i + 1] and row.document_ids[i] == row.document_ids[i + 1]
            if row.position_ids[i] > 0
        ]
        assert anchors.tolist() == expected


def test_a_row_counts_its_longest_answer(tmp_path, tiny_tokenizer):
    path = write(tmp_path / "data.jsonl", *(turns(3, words=words) + turns(2, words=5) for words in (3, 20, 40)))
    found, _ = read(path, tiny_tokenizer)
    for row in found.table:
        runs = "".join("x" if supervised else " " for supervised in row["supervised"]).split()
        assert row["longest"] == max(map(len, runs)) and row["turn_tokens"] == [len(run) for run in runs]


@given(mask=st.lists(st.booleans(), min_size=1, max_size=30))
@settings(deadline=None)
def test_anchors_of_a_document_equal_those_of_its_row(mask):
    document = Document(np.ones(len(mask), np.int32), np.array(mask))
    (row,) = pack_documents([document], len(mask), pad_id=0)
    assert table.num_anchors(document) == len(valid_anchors(row))


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=80))
@settings(deadline=None)
def test_best_fit_equals_a_linear_search(lengths):
    """Place documents longest first, each into the fullest row with enough room. Ties do not affect the row totals."""
    room = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row, left in enumerate(room) if left >= length]
        if not fitting:
            room.append(60)
            fitting = [len(room) - 1]
        room[min(fitting, key=lambda row: room[row])] -= length
    totals = np.bincount(best_fit(np.array(lengths), 60), weights=lengths)
    assert sorted(60 - totals) == sorted(room)


def test_a_document_longer_than_a_row_is_an_error():
    with pytest.raises(ValueError, match="has 5 tokens; expected at most max_seq_len=4"):
        best_fit(np.array([3, 5]), 4)
