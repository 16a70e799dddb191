"""Folders: what the user means is read, in a fixed order, and what is passed over is named."""

import json
import os
import shutil
from pathlib import Path

import pyarrow
import pytest
from datasets import Dataset, DatasetDict, load_from_disk
from datasets.data_files import DataFilesDict, get_data_patterns
from fsspec.utils import glob_translate
from pyarrow import feather

from data.errors import UserError
from data.sources import splits
from data.sources.readers import fingerprint, open_sources, read_all, read_strictly


def records(*values):
    return [{"n": value, "question": "q", "answer": "a"} for value in values]


def write(path, *values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records(*values)))


def read(path, split="train"):
    """Return the numbers in the records, and the notes."""
    notes = []
    sources = open_sources(path, split=split, max_records=None, warn=notes.append)
    return [raw.value["n"] for _, raw in read_all(sources)], notes


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved dataset of 0 to 9 with the caches of `map` and `shuffle`, and a saved DatasetDict."""
    folder = tmp_path_factory.mktemp("saved")
    rows = Dataset.from_list(records(*range(10)))
    rows.save_to_disk(str(folder / "one"), num_shards=2)
    loaded = load_from_disk(str(folder / "one"))
    loaded.map(lambda record: {"n": record["n"] + 100})
    loaded.shuffle(seed=1)
    splits = {"train": rows.select(range(6)), "test": rows.select(range(6, 8)), "dev": rows.select([8])}
    DatasetDict(splits).save_to_disk(str(folder / "dict"))
    DatasetDict({"chat": rows.select([8])}).save_to_disk(str(folder / "single"))
    shutil.copytree(folder / "single", folder / "one_of_two")
    (folder / "one_of_two" / "dataset_dict.json").write_text('{"splits": ["chat", "code"]}')
    for missing in ("train", "test"):
        shutil.copytree(folder / "dict", folder / f"without_{missing}")
        shutil.rmtree(folder / f"without_{missing}" / missing)
    (folder / "without_train" / "train").mkdir()
    return folder


def test_only_the_listed_files_of_a_saved_dataset_are_read(saved):
    assert len(list((saved / "one").glob("cache-*.arrow"))) == 2
    numbers, notes = read(str(saved / "one"))
    assert numbers == list(range(10))
    assert len(notes) == 1 and "cache of datasets (cache-" in notes[0]


def test_a_saved_dataset_is_read_in_the_order_of_its_list(saved, tmp_path):
    folder = tmp_path / "nested" / "one"
    shutil.copytree(saved / "one", folder)
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"].reverse()
    (folder / "state.json").write_text(json.dumps(state))
    assert read(str(tmp_path))[0] == [*range(5, 10), *range(5)]
    (folder / "state.json").write_text(json.dumps(state | {"_data_files": state["_data_files"] * 2}))
    assert read(str(tmp_path))[0] == [*range(5, 10), *range(5)]
    (folder / state["_data_files"][0]["filename"]).unlink()
    with pytest.raises(UserError, match=r"nested/one: data-00001-of-00002\.arrow is missing, but state\.json lists it"):
        read(str(tmp_path))


@pytest.mark.parametrize(
    ("folder", "split", "own", "expected"),
    [
        ("dict", "train", None, range(6)),
        ("dict", "test", None, [6, 7]),
        ("dict", "train", "dev", [8]),
        ("dict", "all", None, [8, 6, 7, *range(6)]),
        ("dict", "Test", None, [6, 7]),
        ("single", "train", None, [8]),
        ("without_test", "train", None, range(6)),
    ],
)
def test_the_split_of_a_saved_dictionary_is_chosen(folder, split, own, expected, saved):
    path = str(saved / folder) if own is None else {"path": str(saved / folder), "split": own}
    numbers, notes = read(path, split)
    assert numbers == list(expected)
    assert ("passed over: split " in "".join(notes)) == (folder != "single" and split != "all")
    assert ("no split 'train'; read the only one, 'chat'" in "".join(notes)) == (folder == "single")
    assert ("folders of other splits are missing (test)" in "".join(notes)) == (folder == "without_test")


@pytest.mark.parametrize(
    ("folder", "split", "own", "message"),
    [
        ("dict", "valid", None, "no split 'valid'; found dev, test, train. Choose one, as in"),
        ("dict", "train", "valid", "no split 'valid'; found dev, test, train"),
        ("single", "train", "train", "no split 'train'; found chat"),
        ("without_train", "train", None, "without_train: train is missing, but dataset_dict.json lists it. Restore"),
        ("one_of_two", "train", None, "no split 'train'; found chat"),
        ("without_test", "all", None, "without_test: test is missing, but dataset_dict.json lists it"),
        ("without_test", "train", "Test", "without_test: test is missing"),
        ("one", "test", None, "data.split=test has no effect"),
        ("one", "train", "train", "split=train has no effect on the local path"),
    ],
)
def test_a_missing_split_is_refused(folder, split, own, message, saved):
    path = str(saved / folder) if own is None else {"path": str(saved / folder), "split": own}
    with pytest.raises(UserError, match=message):
        read(path, split)


def test_a_split_without_effect_on_any_source_is_refused(saved, tmp_path):
    write(tmp_path / "a.jsonl", 1)
    with_own = {"path": str(saved / "dict"), "split": "dev"}
    for path in (str(tmp_path / "a.jsonl"), [str(tmp_path), str(tmp_path / "a.jsonl")], [str(tmp_path), with_own]):
        with pytest.raises(UserError, match="data.split=test has no effect"):
            read(path, "test")
    assert read([str(tmp_path), str(saved / "dict")], "test")[0] == [1, 6, 7]


LAYOUTS = (
    ("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl"),
    ("data/train_sft-00000-of-00001.jsonl", "data/test_sft-00000-of-00001.jsonl"),
    ("train.jsonl", "validation.jsonl", "test.jsonl"),
    ("main/train/0.jsonl", "main/train/1.jsonl", "main/dev/0.jsonl"),
    ("a.jsonl", "b/c.jsonl"),
    ("eval-results.jsonl",),
)


@pytest.mark.parametrize("names", LAYOUTS)
def test_splits_are_those_of_datasets(names, tmp_path):
    for n, name in enumerate(names):
        write(tmp_path / name, n)
    expected = DataFilesDict.from_patterns(get_data_patterns(str(tmp_path)), base_path=str(tmp_path))
    assert sum(map(len, expected.values())) == len(names)
    for split, files in expected.items():
        numbers = sorted(json.loads(line)["n"] for file in files for line in Path(file).read_text().splitlines())
        assert sorted(read(str(tmp_path), str(split))[0]) == numbers


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["test.jsonl"], "train", r"no split 'train'; found test\. Choose one, as in {path: .*, split: test}"),
        (["my-valid.jsonl"], "train", "no split 'train'; found validation"),
        (["data/test_sft-00000-of-00001.jsonl"], "train", "no split 'train'; found test_sft"),
        (["data/train_sft-00000-of-00001.jsonl"], "train", [0]),
        (["data/default-00000-of-00001.jsonl"], "train", [0]),
        (["TRAIN.JSONL", "TEST.JSONL"], "train", [0]),
        (["Train/a.jsonl", "Test/a.jsonl"], "test", [1]),
        (["Data/Train-00000-of-00001.jsonl", "Data/Test-00000-of-00001.jsonl"], "train", [0]),
        (["train/test.jsonl", "train/train.jsonl"], "train", [0, 1]),
        (["test.jsonl", "train.jsonl", "train_test.jsonl"], "train", [1, 2]),
    ],
)
def test_train_is_never_replaced_by_held_out_data(names, split, expected, tmp_path):
    for n, name in enumerate(names):
        write(tmp_path / name, n)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            read(str(tmp_path), split)
        return
    numbers, notes = read(str(tmp_path), split)
    assert sorted(numbers) == expected
    several = "some files are in several splits (train_test.jsonl: test and train)"
    assert (several in "".join(notes)) == ("train_test.jsonl" in names)
    assert ("read the only one" in "".join(notes)) == (len(names) == 1)


@pytest.mark.parametrize(("name", "note"), [("test.jsonl", 0), ("train.jsonl", 1), ("valid.jsonl", 1), ("a.jsonl", 0)])
def test_prompts_from_another_split_are_named(name, note, tmp_path):
    write(tmp_path / name, 1)
    notes = []
    records = read_strictly(str(tmp_path), dict, split="test", limit=None, setting="data.prompts", warn=notes.append)
    assert len(records) == 1 and ["no split 'test'; read the only one" in text for text in notes] == [True] * note


def test_files_beside_those_of_a_split_are_refused_or_passed_over(tmp_path):
    write(tmp_path / "a.jsonl", 1)
    write(tmp_path / "my-test.jsonl", 2)
    with pytest.raises(UserError, match=r"my-test\.jsonl are in the splits test, and a\.jsonl in none\. Choose"):
        read(str(tmp_path))
    numbers, (note,) = read({"path": str(tmp_path), "split": "test"})
    assert numbers == [2] and "no split (a.jsonl)" in note
    assert read(str(tmp_path), "all")[0] == [1, 2]


def test_a_mixture_weighs_the_chosen_splits(tmp_path):
    write(tmp_path / "a" / "train.jsonl", *range(10))
    write(tmp_path / "a" / "test.jsonl", *range(100, 200))
    write(tmp_path / "b.jsonl", *range(20, 50))
    spec = [{"path": str(tmp_path / "a"), "weight": 1}, {"path": str(tmp_path / "b.jsonl"), "weight": 2}]
    numbers, _ = read(spec)
    assert sorted(numbers)[:10] == list(range(10)) and len(numbers) == 30 and max(numbers) < 50


def test_the_configurations_of_a_readme_are_subsets(tmp_path):
    write(tmp_path / "main" / "x.jsonl", 1)
    write(tmp_path / "main" / "y.jsonl", 2)
    write(tmp_path / "other" / "z.jsonl", 3)
    files = "[{split: train, path: main/x.jsonl}, {split: test, path: main/y.jsonl}]"
    main = f"- config_name: main\n  data_files: {files}"
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{main}\n- config_name: other\n  data_files: other/*\n---\n")
    assert read({"path": str(tmp_path), "subset": "main"})[0] == [1]
    assert read({"path": str(tmp_path), "subset": "main"}, "test")[0] == [2]
    numbers, (note,) = read({"path": str(tmp_path), "subset": "other"})
    assert numbers == [3] and "other configurations in README.md (main/x.jsonl, main/y.jsonl)" in note
    with pytest.raises(UserError, match=r"pick one among the available configs: \['main', 'other'\]"):
        read(str(tmp_path))
    os.symlink(tmp_path, tmp_path / "link")
    assert read({"path": str(tmp_path / "link"), "subset": "main"})[0] == [1]
    (tmp_path / "link").unlink()
    (tmp_path / "README.md").write_text("---\nconfigs: [\n---\n")
    with pytest.raises(UserError, match=r"README\.md: invalid YAML between the --- lines \(.*\)\. Fix or remove"):
        read(str(tmp_path))
    (tmp_path / "README.md").write_text("no metadata")
    with pytest.raises(UserError, match="subset=main has no effect"):
        read({"path": str(tmp_path), "subset": "main"})


@pytest.mark.parametrize(
    "metadata", ["configs: [3]", "configs: 3", "configs:\n- config_name: null\n  data_files: a.jsonl"]
)
def test_invalid_configurations_are_one_error(metadata, tmp_path):
    write(tmp_path / "a.jsonl", 1)
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n")
    with pytest.raises(UserError, match=r"Set subset to one in README\.md, or fix its metadata"):
        read(str(tmp_path))


@pytest.mark.parametrize("name", ["json", "parquet"])
def test_a_relative_folder_may_have_the_name_of_a_format(name, tmp_path, monkeypatch):
    write(tmp_path / name / "a.jsonl", 1)
    (tmp_path / name / "README.md").write_text("---\nconfigs:\n- config_name: a\n  data_files: a.jsonl\n---\n")
    monkeypatch.chdir(tmp_path)
    assert read(name)[0] == [1]


@pytest.mark.parametrize(
    "content", ["", "[1]", '{"_data_files": null}', '{"_data_files": [1], "splits": 2}', "[" * 9999]
)
def test_other_files_with_the_names_of_metadata_change_nothing(content, tmp_path):
    write(tmp_path / "train" / "a.jsonl", 1)
    for name in ("state.json", "dataset_dict.json", "train/state.json"):
        (tmp_path / name).write_text(content)
    numbers, (note,) = read(str(tmp_path))
    assert numbers == [1] and "metadata (dataset_dict.json, state.json, train/state.json)" in note


def test_hidden_files_and_other_formats_are_passed_over_by_name(tmp_path):
    write(tmp_path / "d.JSONL", 1)
    for name in (
        ".ipynb_checkpoints/d.jsonl",
        "._d.jsonl",
        ".cache/x/y.jsonl",
        "__MACOSX/d.jsonl",
        "sub/.hidden.jsonl",
    ):
        write(tmp_path / name, 9)
    unread = ("old.csv", "old.jsonl.xz", "x.PARQUET.incomplete", "z.zip", "z.jsonl.1")
    for name in ("README.md", "LICENSE", "notes.txt", "dataset_info.json", "cache-0123456789abcdef.arrow", *unread):
        (tmp_path / name).write_text("{}")
    numbers, (note,) = read(str(tmp_path))
    assert numbers == [1]
    assert "hidden (._d.jsonl, .cache, .ipynb_checkpoints and 2 more)" in note
    first = f"{tmp_path}: passed over: compressed or other data, not read (old.csv, old.jsonl.xz, x.PARQUET.incomplete"
    assert note.startswith(f"{first} and 2 more), ") and "other formats (LICENSE, notes.txt)" in note
    assert "metadata (README.md, dataset_info.json)" in note
    (tmp_path / "d.JSONL").unlink()
    with pytest.raises(UserError, match=r"no data files \(\.jsonl, .*Passed over: .*old\.csv"):
        read(str(tmp_path))


def test_links_are_followed_and_every_file_is_read_once(tmp_path):
    write(tmp_path / "real" / "x.jsonl", 1)
    write(tmp_path / "folder" / "a.jsonl", 2)
    os.symlink(tmp_path / "real", tmp_path / "folder" / "b")
    os.symlink(tmp_path / "real" / "x.jsonl", tmp_path / "folder" / "c.jsonl")
    os.symlink(tmp_path / "folder", tmp_path / "real" / "up")
    numbers, (note,) = read(str(tmp_path / "folder"))
    assert numbers == [2, 1]
    assert "read already under another name (c.jsonl)" in note and "links to a parent folder (b/up)" in note
    os.symlink(tmp_path / "nowhere.jsonl", tmp_path / "folder" / "d.jsonl")
    with pytest.raises(UserError, match=r"d\.jsonl: cannot be read \(No such file"):
        read(str(tmp_path / "folder"))


def test_side_files_of_this_project_are_not_data(tmp_path):
    write(tmp_path / "out.jsonl", 1)
    for name in ("out.dropped.jsonl", "out.unfinished.jsonl", "out.settings.json", "rejects.jsonl"):
        write(tmp_path / name, 9)
    write(tmp_path / "regenerate_rejects.jsonl", 9)
    numbers, (note,) = read(str(tmp_path))
    assert numbers == [1] and "side files of regeneration (out.dropped.jsonl, out.settings.json, out.unf" in note


def test_folders_that_link_to_one_another_are_read_once(tmp_path):
    for a in range(9):
        write(tmp_path / f"{a}" / "f.jsonl", a)
        for b in set(range(9)) - {a}:
            os.symlink(tmp_path / f"{b}", tmp_path / f"{a}" / f"l{b}")
    numbers, (note,) = read(str(tmp_path))
    assert sorted(numbers) == list(range(9)) and "read already under another name (" in note


def test_a_repository_in_the_hub_cache_is_refused(tmp_path):
    for name in ("refs/main", "snapshots/0a/train.jsonl", "blobs/1"):
        write(tmp_path / name, 1)
    with pytest.raises(UserError, match="a repository in the Hub cache"):
        read(str(tmp_path))
    assert read(str(tmp_path / "snapshots" / "0a"))[0] == [1]


def test_passed_over_files_do_not_change_the_fingerprint(saved, tmp_path):
    shutil.copytree(saved / "one", tmp_path / "one")

    def identity():
        return fingerprint(open_sources(str(tmp_path / "one"), split="train", max_records=None))

    before = identity()
    load_from_disk(str(tmp_path / "one")).filter(lambda record: record["n"] > 3)
    (tmp_path / "one" / "README.md").write_text("text")
    assert identity() == before


def test_many_other_splits_are_one_reason(tmp_path):
    for n in range(9):
        write(tmp_path / "data" / f"s{n}-00000-of-00001.jsonl", n)
    numbers, notes = read({"path": str(tmp_path), "split": "s3"})
    assert numbers == [3] and "other splits (" in notes[0] and "and 5 more" in notes[0] and len(notes[0]) < 300


def test_missing_shards_are_named(tmp_path):
    for name in ("train-00001-of-00004", "train-00003-of-00004-0a1b", "test-00000-of-00009"):
        write(tmp_path / "data" / f"{name}.jsonl", 1)
    notes = read(str(tmp_path))[1]
    assert notes[1] == f"{tmp_path}: missing shards: 2 (data/train-00000-of-00004, data/train-00002-of-00004)"
    write(tmp_path / "six" / "part-000000-of-000002.jsonl", 1)
    assert read(str(tmp_path / "six"))[1] == [f"{tmp_path}/six: missing shards: 1 (part-000001-of-000002)"]


def test_characters_that_datasets_takes_for_wildcards_are_part_of_a_name(tmp_path):
    folder = tmp_path / "logs [1] {a,b}" / "x::y*?"
    folder.mkdir(parents=True)
    Dataset.from_list(records(1, 2)).to_parquet(tmp_path / "a.parquet")
    os.rename(tmp_path / "a.parquet", folder / "a.parquet")
    feather.write_feather(pyarrow.Table.from_pylist(records(3)), folder / "b.feather")
    assert read(str(tmp_path))[0] == [1, 2, 3]


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    write(tmp_path / "a.jsonl", 1)
    os.mkdir(os.fsencode(tmp_path) + b"/.\xff")
    numbers, (note,) = read(str(tmp_path))
    assert numbers == [1] and "hidden (.\\udcff)" in note
    os.rename(tmp_path / "a.jsonl", os.fsencode(tmp_path) + b"/\xff.jsonl")
    with pytest.raises(UserError, match=r"udcff\.jsonl: the file name is not valid UTF-8"):
        read(str(tmp_path))


def test_patterns_are_translated_once_for_any_number_of_files(tmp_path, monkeypatch):
    calls = []

    def translate(pattern):
        calls.append(pattern)
        return glob_translate(pattern)

    monkeypatch.setattr(splits, "glob_translate", translate)
    counts = []
    for number in range(60):
        write(tmp_path / f"{number}-train.jsonl", number)
        if number in (1, 59):
            calls.clear()
            assert len(read(str(tmp_path))[0]) == number + 1
            counts.append(len(calls))
    assert counts[0] == counts[1] > 0
