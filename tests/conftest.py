"""Shared fixtures: embedded target, tokenizer and a short run; order of the tests."""

import os
import shutil
import tempfile
from pathlib import Path

# One thread per worker and subprocess: more would compete for the cores. Must be set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests must not need the network
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="flexdraft-tests-")  # for this worker and its subprocesses

import pytest

# Fixtures import torch and transformers themselves: the process that only distributes the tests does not need them.

# Files that take minutes run first, so that no worker starts one of them last.
LONG = ("test_ranks", "test_wrong_calls", "test_decoding", "test_slurm", "test_configs", "test_pipeline")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    """Support `slow(but="text")`: variants whose id contains this text are fast."""
    for item in items:
        if (mark := item.get_closest_marker("slow")) and "but" in mark.kwargs and mark.kwargs["but"] in item.name:
            item.own_markers.remove(mark)
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def pytest_sessionfinish():
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_target():
    """The embedded target."""
    from helpers.shared import TINY

    from models.target import load_target

    return load_target(str(TINY / "target"))


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """The embedded target's tokenizer."""
    from helpers.shared import TINY

    from models.target import load_tokenizer

    return load_tokenizer(str(TINY / "target"))


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory) -> Path:
    """Run directory of the short tiny experiment, all stages by one command."""
    from helpers.shared import SHORT, command

    cwd = tmp_path_factory.mktemp("trained")
    done = command(*SHORT, "name=short", cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    run_dir = cwd / "checkpoints" / "short"
    (run_dir / "stdout.txt").write_text(done.stdout, encoding="utf-8")
    return run_dir
