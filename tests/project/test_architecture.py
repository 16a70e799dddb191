"""Source tree: imports point one way, rooms have no import cycles, files stay short."""

from graphlib import CycleError
from pathlib import Path

import import_graph
import pytest
from helpers.shared import ROOT
from import_graph import arrows, imports, modules, order, room, with_picture

from data.preprocess.tokenized import CODE

ALLOWED = {"data": {"data"}, "models": {"models", "data"}, "train": {"train", "models", "data"}}
HEAVY = {"lightning", "hydra", "omegaconf", "wandb", "deepspeed", "peft"}
# Exceptions: modules that read conf/ need Hydra, and LoRA imports PEFT on use.
MAY_IMPORT = {
    "data.config": {"hydra", "omegaconf"},
    "data.regenerate": {"hydra", "omegaconf"},
    "data.report": {"hydra", "omegaconf"},
    "models.lora": {"peft"},
}
CONTRACT = {"data.batch", "data.errors", "data.threads"}  # what `models` imports of `data`
MODELS_MAY_IMPORT = {"models.verify": {"data.sources"}}  # a command: it reads conversations as training does
DATA_MAY_IMPORT_MODELS = {"data.regenerate"}  # a command: it decodes with the target
COMMANDS = {"data.config", "data.regenerate", "data.report"}  # entry points, which no other module in `data` imports


def test_imports_point_one_way():
    files = modules()
    assert len(files) > 80
    for name, file in files.items():
        package = name.split(".")[0]
        ours = {other for other in imports(file) if other.split(".")[0] in ALLOWED}
        allowed_packages = ALLOWED[package] | ({"models"} if room(name) in DATA_MAY_IMPORT_MODELS else set())
        assert {other.split(".")[0] for other in ours} <= allowed_packages, file
        if package == "models":
            allowed = CONTRACT | MODELS_MAY_IMPORT.get(room(name), set())
            assert {room(other) for other in ours if other.startswith("data.")} <= allowed, file
        if package == "data" and room(name) not in COMMANDS:
            assert not {room(other) for other in ours} & COMMANDS, file
        if package != "train":
            heavy = {other.split(".")[0] for other in imports(file)} & HEAVY
            assert heavy <= MAY_IMPORT.get(room(name), set()), file


def test_rooms_import_one_another_in_no_circle():
    order(arrows())  # raises CycleError


def test_a_circle_between_rooms_is_found(tmp_path):
    for name, text in {"a/x.py": "from data.b import y", "b/y.py": "def f():\n    import data.a.x"}.items():
        file = tmp_path / "data" / name
        file.parent.mkdir(parents=True)
        file.write_text(text)
    with pytest.raises(CycleError):
        order(arrows(tmp_path))


# Modules that find, hold, cache or pack the data without a change of its tokens.
NOT_IN_THE_CACHE_KEY = (
    "batch", "errors", "preprocess.document", "preprocess.packing", "preprocess.tokenized", "sources.cache",
    "sources.folders", "sources.hub", "sources.kinds", "sources.splits",
)  # fmt: skip


def test_the_cache_key_covers_all_modules_that_determine_the_tokens():
    files, found, left = modules(), set(), {"data.preprocess.tokenized"}
    while left:
        found.add(name := left.pop())
        left |= (imports(files[name]) & files.keys()) - found
    assert found == {f"data.{name.replace('/', '.')}" for name in (*CODE, *NOT_IN_THE_CACHE_KEY)}


def test_the_picture_in_the_docs_is_the_code():
    text = import_graph.PAGE.read_text(encoding="utf-8")
    assert with_picture(text) == text, "run scripts/checks/import_graph.py"


def test_folders_say_what_they_hold():
    folders = {file.parent for package in ALLOWED for file in (ROOT / "src" / package).rglob("*.py")}
    for folder in folders - {ROOT / "src/models/custom_generate"}:  # its only file is copied into exports, not imported
        assert (folder / "__init__.py").read_text(encoding="utf-8").startswith('"""'), folder


def test_no_file_is_long():
    for file in [*Path(ROOT / "src").rglob("*.py"), *Path(ROOT / "scripts").rglob("*.py")]:
        assert len(file.read_text(encoding="utf-8").splitlines()) < 400, file
