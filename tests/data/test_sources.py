"""Files, tables and mixtures: each record is read once, with its position, for any chunk size."""

import json
import os

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import UserError
from data.sources import jsonl
from data.sources.jsonl import JsonLines
from data.sources.readers import Source, fingerprint, mix, open_sources, read_all, read_strictly
from data.sources.records import Conversation, conversation, prompt, questions

LINE = st.sampled_from([b"", b"  ", b'{"a": 1}', b'{"a": "\xc3\xa9"}', b"{broken", b"\xff", b"[1]", b'"x"' * 30])
MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def write(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(path)


def numbers(sources):
    return [raw.value["n"] for _, raw in read_all(sources)]


@given(lines=st.lists(LINE, max_size=40), newline=st.sampled_from([b"\n", b"\r\n"]), last=st.booleans())
@settings(max_examples=200, deadline=None)
def test_chunks_contain_every_line_once_with_its_number(tmp_path_factory, lines, newline, last):
    file = tmp_path_factory.mktemp("lines") / "data.jsonl"
    file.write_bytes(newline.join(lines) + (newline if last else b""))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "CHUNK_RECORDS", 3)
        patch.setattr(jsonl, "CHUNK_BYTES", 50)
        patch.setattr(jsonl, "MAX_LINE_BYTES", 70)
        reader = JsonLines(file)
        records = [record for chunk in reader.chunks() for record in reader.read(chunk)]
    expected = [number for number, line in enumerate(lines, start=1) if line.strip()]
    assert [record.position for record in records] == expected and reader.count == len(expected)
    for record in records:
        line = lines[record.position - 1]
        assert (record.error is None) == (line in (b'{"a": 1}', b'{"a": "\xc3\xa9"}', b"[1]"))
        assert record.error or record.value == json.loads(line)
        assert ("expected at most" in (record.error or "")) == (len(line) > 70)


def test_a_byte_order_mark_is_skipped(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps({"messages": MESSAGES}).encode())
    assert read_strictly(str(file), conversation, split="train", limit=None, setting="x") == [Conversation(MESSAGES)]


def test_tables_and_folders_are_read(tmp_path):
    rows = Dataset.from_list([{"n": n, "messages": MESSAGES} for n in range(5)])
    rows.to_parquet(str(tmp_path / "b.parquet"))
    rows.save_to_disk(str(tmp_path / "c"))
    write(tmp_path / "a.jsonl", *({"n": n, "messages": MESSAGES} for n in range(7, 9)))
    sources = open_sources(str(tmp_path), split="train", max_records=None)
    assert numbers(sources) == [7, 8, *range(5), *range(5)]
    assert all(conversation(raw.value).messages == MESSAGES for _, raw in read_all(sources))
    assert [s.reader.location(0).rsplit("/", 1)[-1] for s in sources][1:] == [
        "b.parquet[0]",
        "data-00000-of-00001.arrow[0]",
    ]


def test_the_fingerprint_depends_on_the_content_only(tmp_path):
    a = write(tmp_path / "a.jsonl", {"n": 1}, {"n": 2})
    b = write(tmp_path / "b.jsonl", {"n": 1}, {"n": 2})
    c = write(tmp_path / "c.jsonl", {"n": 1}, {"n": 3})
    fingerprints = [fingerprint(open_sources(path, split="train", max_records=None)) for path in (a, b, c)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    assert fingerprint(open_sources(a, split="train", max_records=1)) != fingerprints[0]


def test_a_table_replaced_with_the_same_modification_time_is_read_again(tmp_path):
    file = tmp_path / "a.parquet"
    Dataset.from_list([{"n": 1}]).to_parquet(str(file))
    stat = file.stat()
    assert numbers(open_sources(str(file), split="train", max_records=None)) == [1]
    Dataset.from_list([{"n": 2}]).to_parquet(str(file))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert numbers(open_sources(str(file), split="train", max_records=None)) == [2]


def test_an_empty_shard_is_accepted(tmp_path):
    rows = Dataset.from_list([{"n": 1}])
    rows.to_parquet(str(tmp_path / "a.parquet"))
    rows.select([]).to_parquet(str(tmp_path / "b.parquet"))
    (tmp_path / "c.jsonl").write_text("\n")
    assert numbers(open_sources(str(tmp_path), split="train", max_records=None)) == [1]


COUNTS = st.lists(st.integers(1, 500), min_size=1, max_size=5)


@given(counts=COUNTS, data=st.data(), limit=st.none() | st.integers(1, 600))
@settings(deadline=None)
def test_a_mixture_follows_its_weights_without_repetition(counts, data, limit):
    weights = data.draw(st.lists(st.floats(0.1, 10), min_size=len(counts), max_size=len(counts)))
    takes = mix(counts, weights, limit)
    assert all(take <= count for take, count in zip(takes, counts, strict=True))
    assert sum(takes) <= (limit or sum(counts))
    for take, weight in zip(takes, weights, strict=True):
        assert abs(take - sum(takes) * weight / sum(weights)) <= 1.5  # rounding
    exhausted = any(take >= count - 1 for take, count in zip(takes, counts, strict=True))
    assert exhausted or sum(takes) >= (limit or 0) - len(counts)  # no larger mixture exists
    plain = mix(counts, [None] * len(counts), None)
    assert plain == counts


@given(count=st.integers(1, 300), fraction=st.floats(0, 1))
@settings(deadline=None)
def test_records_are_selected_evenly(count, fraction):
    take = round(count * fraction)
    reader = type("Any", (), {"count": count})()
    selected = [n for n in range(count) if Source(reader, take).selects(n)]
    assert len(selected) == take
    gaps = [b - a for a, b in zip(selected, selected[1:], strict=False)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_weighted_sources_are_mixed(tmp_path):
    a = write(tmp_path / "a.jsonl", *({"n": n} for n in range(100)))
    b = write(tmp_path / "b.jsonl", *({"n": 1000 + n} for n in range(30)))
    spec = [{"path": a, "weight": 1}, {"path": b, "weight": 3}]
    mixture = numbers(open_sources(spec, split="train", max_records=None))
    assert len(mixture) == len(set(mixture)) == 40 and sum(n >= 1000 for n in mixture) == 30
    assert len(numbers(open_sources([a, b], split="train", max_records=None))) == 130


INVALID = {
    "no such file": ("nowhere.jsonl", "nowhere.jsonl: no such file or folder"),
    "no such folder": ("./nowhere", "nowhere: no such file or folder"),
    "empty list": ([], "empty list"),
    "no path": ([{"weight": 1}], "invalid source"),
    "unknown key": ([{"path": "a", "wait": 1}], "invalid source"),
    "negative weight": ([{"path": "a", "weight": -1}], "weight=-1 for a must be a number > 0"),
    "a split of local files": ([{"path": ".", "split": "test"}], "split=test has no effect on the local path [.]"),
    "a subset of local files": ([{"path": ".", "subset": "main"}], "subset=main has no effect on the local path [.]"),
    "some weights": ([{"path": "a", "weight": 1}, "b"], "Set a weight for every source or for none"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_sources_are_rejected(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", {"n": 1})
    path, message = INVALID[case]
    with pytest.raises(UserError, match=message):
        open_sources(path, split="train", max_records=None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "contains no records"),
        ("a.jsonl", b"\x1f\x8b\x08", "compressed data is damaged"),
        ("a.parquet", b"PAR1 and no more", "invalid Parquet file"),
        ("a.arrow", b"no table", "invalid Arrow file"),
    ],
)
def test_unreadable_files_are_rejected(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_sources(str(tmp_path / name), split="train", max_records=None)


def test_all_record_formats_are_parsed():
    sharegpt = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    full = [{"role": "system", "content": "s"}, *MESSAGES]
    assert conversation({"conversations": sharegpt}).messages == full
    assert conversation({"conversations": sharegpt[1:], "system": "s", "messages": None}).messages == full
    assert conversation({"prompt": "q", "response": "a"}) == conversation({"question": "q", "answer": "a"})
    assert conversation({"question": "q", "answer": "a"}) == Conversation(MESSAGES)
    assert questions({"messages": full}) == Conversation(full[:2])
    assert questions({"turns": ["q", "r"]}) == Conversation([MESSAGES[0], {"role": "user", "content": "r"}])
    assert prompt({"turns": ["q", "r"]}) == prompt({"messages": MESSAGES}) == Conversation(MESSAGES[:1])
    assert conversation({"messages": [*MESSAGES, {"role": "user", "content": "thanks"}]}) == Conversation(MESSAGES)
    assert prompt({"messages": [*MESSAGES, *MESSAGES]}) == Conversation([*MESSAGES, MESSAGES[0]])
