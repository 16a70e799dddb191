"""Files that vanish, grow or change between scan and read; caches that cannot be written: right, or one clear error."""

import errno
import json
import os
import shutil
from concurrent.futures.process import BrokenProcessPool

import multiprocess
import pyarrow
import pytest
from datasets import Dataset
from datasets.arrow_writer import ArrowWriter
from multiprocess.pool import RemoteTraceback
from pyarrow import feather

from data.errors import UserError
from data.preprocess import tokenized
from data.preprocess.chat_template import ChatEncoder
from data.preprocess.tokenized import TokenizeSettings, tokenize
from data.sources.readers import open_sources, read_all

RECORDS = [{"question": f"{n}?", "answer": f"The answer is {n}."} for n in range(20)]


def write(path, records=RECORDS, kind="jsonl"):
    if kind == "json":
        path.write_text(json.dumps(records))
    elif kind == "arrow":
        with pyarrow.ipc.new_stream(str(path), (table := pyarrow.Table.from_pylist(records)).schema) as out:
            out.write_table(table)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def opened(path):
    return open_sources(str(path), split="train", max_records=None)


def values(sources):
    return [raw.value for _, raw in read_all(sources)]


def append(path, records):
    with open(path, "a") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))


SETTINGS = TokenizeSettings(max_seq_len=64, truncation="turn")


@pytest.fixture(scope="module")
def encoder(tiny_tokenizer):
    return ChatEncoder(tiny_tokenizer, {})


def tokens(path, encoder, num_proc=1):
    return tokenize(opened(path), encoder, SETTINGS, num_proc=num_proc)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def test_records_appended_after_the_scan_are_not_read(tmp_path):
    path = write(tmp_path / "data.jsonl")
    sources = opened(path)
    append(path, RECORDS[:3])
    assert values(sources) == RECORDS
    assert opened(path)[0].reader.fingerprint != sources[0].reader.fingerprint


@pytest.mark.parametrize("kind", ["jsonl", "json", "arrow"])
def test_a_file_that_changes_or_vanishes_after_the_scan_is_an_error(kind, tmp_path):
    path = tmp_path / f"data.{kind}"
    write(path, kind=kind)
    sources = opened(path)
    os.utime(path, ns=(0, 0))
    changed = [{**record, "answer": record["answer"].upper()} for record in RECORDS]
    write(path.with_name("new"), changed, kind)
    os.replace(path.with_name("new"), path)
    with pytest.raises(UserError, match=rf"data\.{kind}: the content changed while it was being read"):
        values(sources)
    os.remove(path)
    with pytest.raises(UserError, match=rf"data\.{kind}: (cannot be read \(No such file|the content changed)"):
        values(sources)


@pytest.mark.parametrize("num_proc", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_vanished_file_leaves_no_half_cache(num_proc, tmp_path, cache, encoder, monkeypatch):
    monkeypatch.setattr("data.sources.jsonl.CHUNK_RECORDS", 5)
    path = write(tmp_path / "data.jsonl")
    sources = opened(path)
    os.rename(path, f"{path}.old")
    with pytest.raises(UserError, match=r"data\.jsonl: cannot be read \(No such file"):
        tokenize(sources, encoder, SETTINGS, num_proc=num_proc)
    assert not [entry for entry in (cache / "flexdraft").iterdir() if entry.is_dir()]


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied"), OSError(errno.EIO, "I/O error")])
def test_a_file_or_folder_without_permission_is_an_error(error, tmp_path, monkeypatch):
    write(tmp_path / "data.jsonl")

    def refuse(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.open", refuse)
        with pytest.raises(UserError, match=r"data\.jsonl: cannot be read \((Permission denied|I/O error)\)"):
            opened(tmp_path / "data.jsonl")
    for method in ("iterdir", "is_dir"):
        with monkeypatch.context() as patch:
            patch.setattr(f"pathlib.Path.{method}", refuse)
            with pytest.raises(UserError, match=rf"{tmp_path}: cannot be read \((Permission denied|I/O error)\)"):
                opened(tmp_path)


def test_a_full_disk_is_one_error_of_the_cache_and_leaves_nothing(tmp_path, cache, encoder, monkeypatch):
    path = write(tmp_path / "data.jsonl")

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ArrowWriter, "write_batch", full)
        with pytest.raises(UserError, match=r"HF_DATASETS_CACHE=.*cache: .*No space left.*or set HF_DATASETS_CACHE"):
            tokens(path, encoder)
    assert not [entry for entry in (cache / "flexdraft").iterdir() if entry.is_dir()]
    assert len(tokens(path, encoder)) == len(RECORDS)


def test_a_full_disk_while_a_table_is_converted_is_one_error_of_the_cache(tmp_path, cache, monkeypatch):
    Dataset.from_list(RECORDS).to_parquet(str(tmp_path / "data.parquet"))

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ArrowWriter, "write_table", full)
        with pytest.raises(UserError, match="HF_DATASETS_CACHE=.*No space left on device"):
            opened(tmp_path / "data.parquet")
    assert values(opened(tmp_path / "data.parquet")) == RECORDS


def test_a_cache_that_cannot_be_created_is_an_error(tmp_path, encoder, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    with pytest.raises(UserError, match=r"HF_DATASETS_CACHE=.*file/cache: .*Not a directory"):
        tokens(write(tmp_path / "data.jsonl"), encoder)


def test_a_damaged_cache_entry_is_built_again(tmp_path, cache, encoder):
    path = write(tmp_path / "data.jsonl")
    before = [tokens(path, encoder)[i].input_ids.tolist() for i in range(len(RECORDS))]
    (file,) = cache.rglob("documents.arrow")
    complete = file.read_bytes()
    for content in (
        complete[:100],
        b"",
        complete[:-200] + bytes(200),
        complete[: len(complete) // 2].ljust(9999, b"\0"),
    ):
        file.write_bytes(content)
        again = tokens(path, encoder)
        assert [again[i].input_ids.tolist() for i in range(len(RECORDS))] == before
    (cache / "flexdraft" / file.parent.name / "files.json").unlink()
    assert len(tokens(path, encoder)) == len(RECORDS)


@pytest.mark.parametrize("kind", ["parquet", "feather"])
def test_a_damaged_conversion_of_a_table_is_repeated(kind, tmp_path, cache):
    path = tmp_path / f"data.{kind}"
    if kind == "parquet":
        Dataset.from_list(RECORDS).to_parquet(str(path))
    else:
        feather.write_feather(pyarrow.Table.from_pylist(RECORDS), path)
    assert values(opened(path)) == RECORDS
    (converted,) = cache.rglob("*.arrow")
    complete = converted.read_bytes()
    for content in (complete[:300], b"", complete[:-200] + bytes(200)):
        converted.unlink()  # it is mapped into memory
        converted.write_bytes(content)
        assert values(opened(path)) == RECORDS


def test_a_complete_cache_entry_is_read_without_writing(tmp_path, cache, encoder, monkeypatch):
    path = write(tmp_path / "data.jsonl")
    tokens(path, encoder)
    Dataset.from_list(RECORDS).to_parquet(str(tmp_path / "data.parquet"))
    feather.write_feather(pyarrow.Table.from_pylist(RECORDS), tmp_path / "[b].arrow")
    special = (tmp_path / "data[1].parquet", tmp_path / "[b].arrow")
    shutil.copy(tmp_path / "data.parquet", special[0])
    for name in (tmp_path / "data.parquet", *special):
        opened(name)

    def refuse(*_args, **_kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    assert len(tokens(path, encoder)) == len(RECORDS)
    assert values(opened(tmp_path / "data.parquet")) == RECORDS
    for name in special:
        assert values(opened(name)) == RECORDS
    append(path, RECORDS[:1])
    with pytest.raises(UserError, match=r"HF_DATASETS_CACHE=.*Read-only file system\)\. Make it writable, or"):
        tokens(path, encoder)


def test_errors_of_the_records_are_not_taken_for_errors_of_the_cache(tmp_path, cache, encoder, monkeypatch):
    def fail(*_args, **_kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(tokenized, "table_rows", fail)
    with pytest.raises(ZeroDivisionError):
        tokens(write(tmp_path / "data.jsonl"), encoder)


def caused(error, *, by=None, after=None):
    error.__cause__, error.__context__ = by, after
    return error


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError("One of the subprocesses has abruptly died"), True),
        (EOFError(), True),
        (BrokenPipeError(), True),
        (caused(multiprocess.TimeoutError(), after=EOFError()), True),
        (BrokenProcessPool(), True),
        (caused(RuntimeError("of a record"), by=RemoteTraceback("")), False),
        (caused(multiprocess.TimeoutError(), after=KeyboardInterrupt()), False),
    ],
)
def test_a_lost_worker_is_one_error(error, is_lost, tmp_path, cache, encoder, monkeypatch):
    monkeypatch.setattr("data.sources.jsonl.CHUNK_RECORDS", 5)

    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(Dataset, "map", fail)
    path = write(tmp_path / "data.jsonl")
    with pytest.raises(UserError if is_lost else type(error)) as raised:
        tokens(path, encoder, num_proc=2)
    assert raised.value is error or "a worker process ended unexpectedly" in str(raised.value)
    with pytest.raises(type(error)):
        tokens(path, encoder)


@pytest.mark.slow
def test_arrays_and_tables_are_tokenized_in_parallel_as_in_one_process(tmp_path, cache, encoder, monkeypatch):
    monkeypatch.setattr("data.sources.json_values.CHUNK_RECORDS", 3)
    monkeypatch.setattr("data.sources.tables.CHUNK_RECORDS", 3)
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "a.json", RECORDS, "json")
    write(tmp_path / "data" / "b.arrow", RECORDS, "arrow")
    found = []
    for num_proc in (1, 2):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / f"cache{num_proc}")
        documents = tokens(tmp_path / "data", encoder, num_proc)
        found.append([documents[i].input_ids.tolist() for i in range(len(documents))])
    assert found[0] == found[1] and found[0][:20] == found[0][20:] and len(found[0]) == 40
