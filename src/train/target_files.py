"""A local target's identity: the content of the files that transformers reads, and of no others beside them."""

import hashlib
import json
from pathlib import Path

from train.run_state import file_sha256

MODEL = ("config.json", "generation_config.json", "adapter_config.json", "adapter_model.safetensors")
# In the order in which transformers takes them: the first that is there counts.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TOKENIZER += ("chat_template.jinja",)
VOCABULARY = ("vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "vocab.txt")  # without tokenizer.json
WHOLE = 2**30  # bytes; of a larger file, pieces are hashed
PIECE, STRIDE = 2**20, 2**24  # bytes


def target_files(directory: Path) -> list[Path]:
    """The files that loading a model and its tokenizer from a directory reads."""
    weights = next((directory / name for name in WEIGHTS if (directory / name).is_file()), None)
    files = [] if weights is None else [weights]
    if weights is not None and weights.name.endswith(".index.json"):
        index = json.loads(weights.read_text(encoding="utf-8"))
        files += [directory / name for name in sorted(set(index["weight_map"].values()))]
    return [*_there(directory, MODEL), *files, *tokenizer_files(directory)]


def tokenizer_files(directory: Path) -> list[Path]:
    """The files that loading a tokenizer from a directory reads."""
    names = TOKENIZER if (directory / "tokenizer.json").is_file() else TOKENIZER + VOCABULARY
    return _there(directory, names)


def hashes(files: list[Path]) -> dict[str, str]:
    """File name -> SHA-256 of its content."""
    return {file.name: _content(file) for file in files if file.is_file()}


def _there(directory: Path, names: tuple[str, ...]) -> list[Path]:
    return [directory / name for name in names if (directory / name).is_file()]


def _content(file: Path) -> str:
    """Of a large file: its size, and a piece out of every 16 MiB. Training a model further changes all of them."""
    length = file.stat().st_size
    if length < WHOLE:
        return file_sha256(file)
    sha256 = hashlib.sha256(str(length).encode())
    with file.open("rb") as content:
        for start in (*range(0, length, STRIDE), length - PIECE):
            content.seek(start)
            sha256.update(content.read(PIECE))
    return sha256.hexdigest()
