"""Small targets, drafters and documents that the tests share."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# One thread for each of the two workers and what they start: more would fight over the cores. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need the network
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="flexdraft-tests-")  # of this worker and what it starts

import numpy as np
import pytest
import torch

from data.preprocess.chat_template import Document
from models.draft import DraftModel
from models.target import load_target, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "src" / "data" / "tiny"

ARCHITECTURE = {
    "model_type": "qwen3",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def random_target(dtype: str = "float32", seed: int = 0, **changes):
    """A small Qwen3 with random weights, large enough that its outputs are far from uniform."""
    torch.manual_seed(seed)
    return load_target(None, architecture=ARCHITECTURE | {"initializer_range": 0.2} | changes, dtype=dtype)


def random_draft(
    target, *, num_layers: int = 3, block_size: int = 6, rank: int = 8, seed: int = 1, **beyond
) -> DraftModel:
    """A drafter far from its initialisation, so that no test passes because draft and target are alike."""
    torch.manual_seed(seed)
    draft = DraftModel(target, num_layers=num_layers, block_size=block_size, calibrator_rank=rank, **beyond)
    with torch.no_grad():
        for parameter in draft.own_parameters().values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return draft


def random_documents(
    count: int, seed: int = 0, *, low: int = 12, high: int = 40, vocabulary: int = 97
) -> list[Document]:
    """Conversations of random tokens: a prompt, an answer, sometimes a second turn."""
    generator = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        length = int(generator.integers(low, high + 1))
        supervised = np.zeros(length, bool)
        start = int(generator.integers(1, 6))
        supervised[start:] = True
        if generator.random() < 0.5:
            supervised[length // 2 : length // 2 + 3] = False
        documents.append(Document(generator.integers(3, vocabulary, length).astype(np.int32), supervised))
    return documents


# Files that take minutes begin first, so that neither worker is left with one of them in the end.
LONG = ("test_ranks", "test_wrong_calls", "test_decoding", "test_slurm", "test_configs", "test_pipeline")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    """`slow(but="text")`: variants whose id holds this text are fast."""
    for item in items:
        if (mark := item.get_closest_marker("slow")) and "but" in mark.kwargs and mark.kwargs["but"] in item.name:
            item.own_markers.remove(mark)
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def pytest_sessionfinish():
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_target():
    """The embedded target."""
    return load_target(str(TINY / "target"))


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """The embedded target's tokenizer."""
    return load_tokenizer(str(TINY / "target"))


def command(
    *overrides: str, cwd: Path, timeout: float = 300, module: str = "train", **environment: str
) -> subprocess.CompletedProcess:
    """`python -m train ...`, or another command, as a user would call it."""
    call = [sys.executable, "-m", module, *overrides]
    return subprocess.run(call, cwd=cwd, capture_output=True, text=True, timeout=timeout, env=os.environ | environment)


def command_stopped_at_checkpoint(
    *overrides: str, cwd: Path, stage: str, number: int, **environment: str
) -> subprocess.CompletedProcess:
    """The same, sent a signal once there is a checkpoint of a stage of the run called `short`."""
    call = [sys.executable, "-m", "train", *overrides, "name=short"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": os.environ | environment}
    process = subprocess.Popen(call, cwd=cwd, start_new_session=True, **pipes)
    deadline = time.monotonic() + 120
    while not list((cwd / "checkpoints" / "short" / stage / "checkpoints").glob("step-*.ckpt")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, number)
    output, errors = process.communicate(timeout=120)
    return subprocess.CompletedProcess(call, process.returncode, output, errors)


# The tiny experiment, cut down to seconds.
SHORT = (
    "+experiment=tiny",
    "stage.attention_tuning.steps=40",
    "stage.attention_tuning.rows_per_step=4",
    "stage.attention_tuning.checkpoint_every=4",
    "stage.bonus_calibration.steps=12",
    "stage.bonus_calibration.rows_per_step=2",
    "stage.bonus_calibration.checkpoint_every=4",
    "data.max_records=400",
    "data.validation_records=16",
    "stage.attention_tuning.decode.prompts=4",
    "stage.attention_tuning.decode.max_new_tokens=16",
    "stage.bonus_calibration.decode.prompts=4",
    "stage.bonus_calibration.decode.max_new_tokens=16",
    "stage.evaluate.num_prompts=6",
    "stage.evaluate.max_new_tokens=40",
    "stage.evaluate.speed.num_prompts=2",
    "stage.evaluate.speed.batch_sizes=[1,2]",
)


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory) -> Path:
    """Run directory of the short tiny experiment, all stages by one command."""
    cwd = tmp_path_factory.mktemp("trained")
    done = command(*SHORT, "name=short", cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    run_dir = cwd / "checkpoints" / "short"
    (run_dir / "stdout.txt").write_text(done.stdout, encoding="utf-8")
    return run_dir
