"""Commands, small random targets, drafters and documents."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from data.preprocess.document import Document
from models.draft import DraftModel
from models.draft_config import DraftConfig
from models.target import load_target

ROOT = Path(__file__).resolve().parents[2]


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
    """Return a small Qwen3 with random weights of a scale that makes its outputs far from uniform."""
    torch.manual_seed(seed)
    return load_target(None, architecture=ARCHITECTURE | {"initializer_range": 0.2} | changes, dtype=dtype)


def random_draft(
    target, *, num_layers: int = 3, block_size: int = 6, rank: int = 8, seed: int = 1, **beyond
) -> DraftModel:
    """Return a drafter far from its initialization, so that no test passes by similarity of draft and target."""
    torch.manual_seed(seed)
    draft = DraftModel(
        target, DraftConfig(num_layers=num_layers, block_size=block_size, calibrator_rank=rank, **beyond)
    )
    with torch.no_grad():
        for parameter in draft.own_parameters().values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return draft


def random_documents(
    count: int, seed: int = 0, *, low: int = 12, high: int = 40, vocabulary: int = 97
) -> list[Document]:
    """Return conversations of random tokens: a prompt, an answer, sometimes a second turn."""
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


def command(
    *overrides: str, cwd: Path, timeout: float = 300, module: str = "train", **environment: str
) -> subprocess.CompletedProcess:
    """Run `python -m train ...` or another command in a subprocess, as a user would."""
    call = [sys.executable, "-m", module, *overrides]
    return subprocess.run(call, cwd=cwd, capture_output=True, text=True, timeout=timeout, env=os.environ | environment)


def command_stopped_at_checkpoint(
    *overrides: str, cwd: Path, stage: str, number: int, **environment: str
) -> subprocess.CompletedProcess:
    """Run a command, and send it a signal once a stage of the run `short` has a checkpoint."""
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


# The tiny experiment, reduced to seconds.
SHORT = (
    "+experiment=tiny",
    "stage.attention_tuning.steps=40",
    "stage.attention_tuning.global_batch_size=4",
    "stage.attention_tuning.checkpoint_every=4",
    "stage.bonus_calibration.steps=12",
    "stage.bonus_calibration.global_batch_size=2",
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
