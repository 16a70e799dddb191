"""File formats: the same records in any layout, compression or spelling; everything else is refused by name."""

import gzip
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import feather

from data.errors import UserError
from data.sources import json_values, jsonl
from data.sources.formats import open_file
from data.sources.json_values import JsonValues
from data.sources.jsonl import JsonLines
from data.sources.readers import open_sources, read_all, read_strictly

RECORDS = [{"n": n, "text": f"Zoë {'x' * n}\n"} for n in range(40)]


def as_lines(records, end="\n", ascii_only=True):
    return "".join(json.dumps(record, ensure_ascii=ascii_only) + end for record in records).encode()


LINES = as_lines(RECORDS)
ARRAY = json.dumps(RECORDS).encode()
CONTENTS = {
    "lines.jsonl": LINES,
    "lines.NDJSON": as_lines(RECORDS, ascii_only=False),
    "lines.json": LINES,
    "crlf.jsonl": as_lines(RECORDS, "\r\n"),
    "cr.jsonl": as_lines(RECORDS, "\r"),
    "no newlines.jsonl": as_lines(RECORDS, " "),
    "array.json": ARRAY,
    "array with a byte order mark.json": b"\xef\xbb\xbf\n " + ARRAY,
    "byte order mark before an empty line.jsonl": b"\xef\xbb\xbf\n" + LINES,
    "files with byte order marks.jsonl": b"".join(
        b"\xef\xbb\xbf" + as_lines(part) for part in (RECORDS[:9], RECORDS[9:])
    ),
    "array.jsonl": ARRAY,
    "pretty array.json": json.dumps(RECORDS, indent=2, ensure_ascii=False).encode(),
    "pretty objects.json": "\n".join(json.dumps(record, indent=2) for record in RECORDS).encode(),
    "lines.jsonl.gz": gzip.compress(LINES),
    "two members.jsonl.GZ": gzip.compress(as_lines(RECORDS[:9])) + gzip.compress(as_lines(RECORDS[9:])),
    "array.json.gz": gzip.compress(ARRAY),
    "skippable frame.jsonl.zst": b"\x50\x2a\x4d\x18\x01\0\0\0a" + pa.compress(LINES, codec="zstd", asbytes=True),
    "lines.jsonl.zst": pa.compress(LINES, codec="zstd", asbytes=True),
    "gzip without its ending.jsonl": gzip.compress(LINES),
}


def values(reader):
    return [raw.value for chunk in reader.chunks() for raw in reader.read(chunk)]


@pytest.mark.parametrize("name", CONTENTS)
def test_every_layout_gives_the_same_records(name, tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "CHUNK_RECORDS", 7)
    monkeypatch.setattr(json_values, "CHUNK_RECORDS", 7)
    file = tmp_path / name
    file.write_bytes(CONTENTS[name])
    for path in (file, tmp_path, [file]):
        path = list(map(str, path)) if isinstance(path, list) else str(path)
        sources = open_sources(path, split="train", max_records=None)
        assert [raw.value for _, raw in read_all(sources)] == RECORDS
        assert len(sources[0].reader.chunks()) == 6 and sources[0].reader.label == name


def test_a_compressed_file_has_the_fingerprint_of_its_content(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    for name, content in (("a.jsonl.gz", gzip.compress(LINES)), ("b.jsonl.gz", gzip.compress(LINES, 1))):
        (tmp_path / name).write_bytes(content)
        assert open_file(tmp_path / name, name).fingerprint == open_file(tmp_path / "a.jsonl", "a").fingerprint


VALUE = st.sampled_from([None, -1.5, 10**9, "", 'é"\\]', "\U0001f600\n", "a" * 50, [1, {"b": "}"}], {"c": {"d": [[]]}}])


@given(
    records=st.lists(st.dictionaries(st.sampled_from("abé"), VALUE) | st.integers(0, 10**6), max_size=20),
    indent=st.none() | st.integers(0, 2),
    ascii_only=st.booleans(),
    array=st.booleans(),
    piece=st.integers(1, 60),
)
@settings(max_examples=60, deadline=None)
def test_values_are_read_as_the_json_module_reads_them(tmp_path_factory, records, indent, ascii_only, array, piece):
    texts = [json.dumps(record, indent=indent, ensure_ascii=ascii_only) for record in records]
    text = f"[{' ,'.join(texts)}\n]" if array else " \n".join(texts)
    file = tmp_path_factory.mktemp("values") / "data.json"
    file.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_values, "CHUNK_RECORDS", 3)
        patch.setattr(json_values, "READ_BYTES", piece)
        reader = JsonValues(file)
    assert values(reader) == records and reader.count == len(records)
    assert [raw.position for chunk in reader.chunks() for raw in reader.read(chunk)] == list(range(len(records)))


@pytest.mark.parametrize(
    ("text", "good", "reason"),
    [
        (ARRAY[:-100], 38, "invalid JSON at line 1: Unterminated string"),
        (ARRAY[:-1], 40, "invalid JSON at line 1: the array has no end"),
        (b"[{}", 1, "the array has no end"),
        (b'[{}, {"a": tru', 1, "(11 of 14 bytes)"),
    ],
)
def test_the_cut_off_end_of_an_array_is_one_bad_record_after_the_good_ones(text, good, reason, tmp_path):
    (tmp_path / "data.json").write_bytes(text)
    reader = open_file(tmp_path / "data.json", "data.json")
    *before, last = [raw for chunk in reader.chunks() for raw in reader.read(chunk)]
    assert len(before) == good and not any(raw.error for raw in before) and reader.count == good + 1
    assert reason in last.error and "nothing after it can be read" in last.error
    assert reader.location(last.position) == f"{tmp_path}/data.json[{good}]"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"[{}\n,\n{}\n {}]", r"invalid JSON at line 4: expected a comma .*; 5 of 13 bytes cannot be read"),
        (b'[{"a": }, {}]', "invalid JSON at line 1: Expecting value; 12 of 13 bytes"),
        (b"[{}] more than a word", "Expecting value; 17 of 21 bytes"),
        (b"[" + b"[" * 100_000, "invalid JSON at line 1"),
    ],
)
def test_damage_before_the_end_of_an_array_is_an_error(text, reason, tmp_path):
    (tmp_path / "data.json").write_bytes(text)
    with pytest.raises(UserError, match=rf"data\.json: .*{reason}"):
        open_file(tmp_path / "data.json", "data.json")


SEVERAL = {
    "arrays": (b'[{"n": 0}, {"n": 1}]\n[]\n[{"n": 2}]', [0, 1, 2], 0),
    "pretty arrays": (b'[\n{"n": 0}\n]\n[\n{"n": 1},\n]\n,{"n": 2}', [0, 1, 2], 0),
    "pretty objects and commas": (b'{\n"n": 0},\n{\n"n": 1},\n', [0, 1], 0),
    "lines and commas": (b'{"n": 0},\n{"n": 1}\n', [0, 1], 0),
    "an empty array first": (b'[]\n{"n": 0}\n{"n": 1}\n', [0, 1], 1),
    "a message first": (b'[INFO] start\n{"n": 0}\n{"n": 1}\n', [0, 1], 1),
    "byte-order marks": (b'\xef\xbb\xbf[{"n": 0}]\n\xef\xbb\xbf[\n{"n": 1}]\xef\xbb\xbf[{"n": 2}]', [0, 1, 2], 0),
    "arrays and lines": (b'[{"n": 0, "turns": []}, {"n": 1}]\n{"n": 2}\n[{"n": 3}]\n', [0, 1, 2, 3], 0),
    "a long integer": (b'[{"n": 0}, {"n": ' + b"1" * 5000 + b'}, {"n": 2}]', [0, 2], 1),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_text_after_the_first_array_or_object_is_read(name, tmp_path):
    content, numbers, bad = SEVERAL[name]
    (tmp_path / "data.json").write_bytes(content)
    found = values(open_file(tmp_path / "data.json", "data.json"))
    assert [value["n"] for value in found if value] == numbers and len(found) == len(numbers) + bad


def test_invalid_utf8_in_an_array_is_a_bad_record(tmp_path):
    (tmp_path / "data.json").write_bytes(b'[{"a": "\xc3\xa9"}, {"a": "\xe9"}, {"a": "\\udce9"}]')
    reader = open_file(tmp_path / "data.json", "data.json")
    first, second, third = [raw for chunk in reader.chunks() for raw in reader.read(chunk)]
    assert first.value == {"a": "é"} and third.value == {"a": "\udce9"}
    assert second.error == "invalid UTF-8: byte 0xe9" and second.as_text() == '{"a": "\\xe9"}'


def test_a_value_that_is_too_long_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(json_values, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(json_values, "READ_BYTES", 100)
    (tmp_path / "data.json").write_text(json.dumps([{}, {"a": "x" * 5000}, {}]))
    with pytest.raises(UserError, match="no complete value within 1,000 characters; 5,0.* of 5,0.* bytes"):
        JsonValues(tmp_path / "data.json")


@pytest.mark.parametrize(
    ("text", "reason"), [('{"question" "q"}', "Expecting ':' delimiter"), ("-" * 50, "Expecting value")]
)
def test_damage_far_from_the_end_is_named(text, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(json_values, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(json_values, "READ_BYTES", 100)
    (tmp_path / "data.json").write_text(f"[{{}}, {text}, {json.dumps([{'a': 'x'}] * 500)}]")
    with pytest.raises(UserError, match=f"line 1: {reason}; [56],... of [56],... bytes cannot be read"):
        JsonValues(tmp_path / "data.json")


@pytest.mark.parametrize(
    "record",
    [
        {"query": "q", "answers": [{"question": 1}], "tools": [{"name": "f", "input": {}, "system": ""}]},
        {"messages": [{"role": "system", "content": "", "tools": []}]},
        {"question": "q", "answer": "a", "metadata": {"question": "", "list": [{"prompt": ""}]}},
    ],
)
def test_a_file_with_a_single_record_is_no_wrapper(record, tmp_path):
    for name, indent in (("a.jsonl", None), ("b.json", 1)):
        (tmp_path / name).write_text(json.dumps(record, indent=indent))
        assert values(open_file(tmp_path / name, name)) == [record]


def test_a_first_line_that_is_no_json_does_not_change_the_layout(tmp_path):
    for first in (b"{broken", b'{"a": 1} x', b"text", b'{"a": ['):
        (tmp_path / "data.jsonl").write_bytes(first + b'\n{"n": 1}\n')
        reader = open_file(tmp_path / "data.jsonl", "data.jsonl")
        bad, good = next(reader.read(reader.chunks()[0])), values(reader)[1]
        assert isinstance(reader, JsonLines) and bad.error and good == {"n": 1}


def test_a_single_line_that_is_too_long_is_an_error(tmp_path, monkeypatch):
    for module in ("formats", "jsonl"):
        monkeypatch.setattr(f"data.sources.{module}.MAX_LINE_BYTES", 1000)
    (tmp_path / "a.json").write_text(json.dumps({"data": [{"messages": []}] * 500}))
    with pytest.raises(UserError, match=r"a\.json: a single line of [\d,]+ bytes.*jq -c '\.KEY\[\]'"):
        open_file(tmp_path / "a.json", "a.json")


REFUSED = {
    "a.csv": (b"question,answer\n", "CSV and TSV files are not supported. Convert it with: python -c"),
    "a.txt": (b"text", "unsupported format. Expected .jsonl"),
    "a.jsonl.bz2": (b"BZh91AY", "unsupported format. Decompress it first"),
    "a.json.xz": (b"\xfd7zXZ\x00", "unsupported format. Decompress it first"),
    "a.zip": (b"PK\x03\x04", "unsupported format. Decompress it first"),
    "a.tar.gz": (gzip.compress(b"a.jsonl".ljust(257, b"\0") + b"ustar"), "unsupported format. Decompress it first"),
    "a.jsonl": ("{}\n".encode("utf-16"), "probably UTF-16. Convert it with: iconv -f UTF-16 -t UTF-8"),
    "b.jsonl": ('{"a": 1}\n'.encode("utf-16-be"), "probably UTF-16-BE"),
    "c.jsonl.gz": (gzip.compress(LINES)[:-20], "damaged or incomplete (Compressed file ended before"),
    "d.jsonl.gz": (gzip.compress(LINES) + b"garbage", "damaged or incomplete (Not a gzipped file"),
    "e.jsonl.gz": (gzip.compress(LINES)[:-8] + bytes(8), "damaged or incomplete (CRC check failed"),
    "f.jsonl.zst": (pa.compress(LINES, codec="zstd", asbytes=True)[:-10], "damaged or incomplete (Truncated"),
    "g.json": (b'{"version": 1,\n "data": [{"messages": []}]}', "the records in `data`.*jq -c '.data[]'"),
    "damaged object.json": (b'{\n "messages": [\n', "an object that spans lines, and is damaged or longer"),
    "by id.json": (b'{"a": {"messages": []},\n "b": {}}', "a record under each key; .*jq -c '.[]'"),
    "my data.json": (b'{"my data": [{"messages": []}]}', """the records in `my data`.*jq -c '.["my data"][]' '"""),
    "nested.json": (b'{"data": {"train": [{"messages": []}]}}', "the records in `data.train`.*jq -c '.data.train[]'"),
    "n.json": (b'{"a b": {"c": [{"question": ""}]}}', "the records in `a b.c`.*jq -c '.[\"a b\"].c[]'"),
    "in an array.json": (b'[{"data": [{"messages": []}]}]', "the records in `data`.*jq -c '.[].data[]'"),
    "inner.json": (b'{"conversations": [{"conversations": []}]}', "in `conversations`.*jq -c '.conversations[]'"),
    "zeros.jsonl": (bytes(600), "begins with zero bytes, e.g. since"),
    "mark.jsonl": (b"\xef\xbb\xbf", "contains no records"),
    "long.jsonl.zst": (b"\x28\xb5\x2f\xfd\x00\xa8\x19\0\0{}\n", "a longer window.*with: zstd -d --long=31 /"),
    "pointer.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer.*git lfs pull"),
    "twice.jsonl.gz": (gzip.compress(gzip.compress(LINES)), "compressed more than once"),
    "h.json": (b" [ ]\n", "contains no records"),
    "i.parquet": (b"PAR1 and no more", "invalid Parquet file"),
    "j.arrow": (b"ARROW1\0\0 and no more", "invalid Arrow file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_content_is_refused_with_the_way_out(name, tmp_path):
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        open_sources(str(tmp_path / name), split="train", max_records=None)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
    assert all(part in str(error.value) for part in message.split(".*"))
    assert not list((tmp_path / name).parent.glob("*.tmp"))


PATHS = {
    "C:\\data\\a.jsonl": "no drive letter",
    "C:/data": "no drive letter",
    "logs\\a": "forward slashes",
    "logs/*.jsonl": "Wildcards are not expanded",
    "s3://bucket/key": "no such file or folder. Specify",
    "~nobody/x": "no such file or folder. Specify",
    "~/nowhere/x": "no such file or folder. Specify",
    "pipe": "neither a file nor a folder",
    "link": "a link to nowhere, which does not exist",
}


@pytest.mark.parametrize("path", PATHS)
def test_paths_that_are_no_files_are_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.symlink("nowhere", "link")
    for item in (path, [path]):
        with pytest.raises(UserError, match=PATHS[path]):
            open_sources(item, split="train", max_records=None)


def test_the_hub_is_not_asked_again_without_a_connection(monkeypatch):
    from datasets import config

    from data.sources import hub

    class Api:
        def dataset_info(self, name, timeout):
            raise RuntimeError("no route")

    def load(name, subset, split):
        assert config.HF_HUB_OFFLINE
        raise ConnectionError("offline")

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "load_dataset", load)
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match=r"owner/name: no such file or folder, and loading split 'train'.*offline"):
        open_sources("owner/name", split="train", max_records=None)
    assert not config.HF_HUB_OFFLINE


def test_a_feather_file_is_read(tmp_path):
    feather.write_feather(pa.Table.from_pylist(RECORDS), tmp_path / "a.feather")
    (tmp_path / "b.arrow").write_bytes((tmp_path / "a.feather").read_bytes())
    for name in ("a.feather", "b.arrow"):
        assert values(open_file(tmp_path / name, name)) == RECORDS


def test_a_stream_that_is_cut_between_batches_is_named(tmp_path):
    table = pa.Table.from_pylist(RECORDS)
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as out:
        for batch in table.to_batches(max_chunksize=10):
            out.write_batch(batch)
    content = (tmp_path / "a.arrow").read_bytes()
    marker = b"\xff\xff\xff\xff\0\0\0\0"
    assert content.endswith(marker)
    notes = []
    for text in (content, content.removesuffix(marker)):
        (tmp_path / "a.arrow").write_bytes(text)
        (source,) = open_sources(str(tmp_path), split="train", max_records=None, warn=notes.append)
        assert values(source.reader) == RECORDS
    assert notes == [f"{tmp_path}/a.arrow: the end marker of the stream is missing; the file may be incomplete"]


def test_damaged_offsets_in_an_arrow_file_are_an_error(tmp_path):
    """Reading such rows ends the process."""
    table = pa.Table.from_pylist([{"question": "q"}] * 30)
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as out:
        out.write_table(table)
    content, offsets = (tmp_path / "a.arrow").read_bytes(), np.arange(31, dtype=np.int32)
    assert offsets.tobytes() in content
    (tmp_path / "a.arrow").write_bytes(content.replace(offsets.tobytes(), (offsets * 2**20).tobytes()))
    with pytest.raises(UserError, match=r"a\.arrow: invalid Arrow file \("):
        open_sources(str(tmp_path), split="train", max_records=None)


def test_an_arrow_file_with_two_streams_is_refused(tmp_path):
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), (table := pa.Table.from_pylist(RECORDS)).schema) as out:
        out.write_table(table)
    (tmp_path / "a.arrow").write_bytes((tmp_path / "a.arrow").read_bytes() * 2)
    with pytest.raises(UserError, match=r"a\.arrow: invalid Arrow file \(found [\d,]+ bytes after the end"):
        open_file(tmp_path / "a.arrow", "a.arrow")


def test_columns_of_unknown_types_are_not_read(tmp_path):
    columns = {
        "n": [1],
        "map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
        "id": pa.array([b"0" * 16], pa.uuid()),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    (source,) = open_sources(str(tmp_path / "a.parquet"), split="train", max_records=None, warn=(notes := []).append)
    assert values(source.reader) == [{"n": 1}] and "columns map, id (types that" in notes[0]


def with_media(tmp_path):
    """Write a Parquet and an Arrow file whose images cannot be decoded."""
    features = Features(n=Value("int64"), images=[Image()], image=Image())
    broken = {"bytes": b"no image", "path": None}
    rows = Dataset.from_list([{"n": n, "images": [broken], "image": broken} for n in range(3)], features=features)
    rows.to_parquet(str(tmp_path / "a.parquet"))
    rows.save_to_disk(str(tmp_path / "b"))
    return tmp_path / "a.parquet", tmp_path / "b"


def test_columns_with_media_are_not_read(tmp_path):
    for path in with_media(tmp_path):
        notes = []
        sources = open_sources(str(path), split="train", max_records=None, warn=notes.append)
        assert [raw.value for _, raw in read_all(sources)] == [{"n": n} for n in range(3)]
        assert "passed over the columns images, image" in notes[0]


def test_a_row_that_cannot_be_decoded_is_a_bad_record(tmp_path, monkeypatch):
    monkeypatch.setattr("data.sources.tables.KEYS", {"image"})
    rows = [{"image": None}, {"image": {"bytes": b"no image", "path": None}}]
    file = tmp_path / "a.parquet"
    Dataset.from_list(rows, features=Features(image=Image())).to_parquet(str(file))
    with pytest.raises(UserError, match=r"a\.parquet\[1\]: the row cannot be decoded: UnidentifiedImageError"):
        read_strictly(str(file), lambda record: record, split="test", limit=None, setting="x")
