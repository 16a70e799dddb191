"""A target's identity: the content of the files that transformers reads, wherever they lie.

The same model by its Hub id, by a directory and by another directory is one target, also where its configs were saved
again by another release of transformers.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from train.run_dir.state import file_sha256

MODEL = ("config.json", "generation_config.json", "adapter_config.json", "adapter_model.safetensors")
# In the order in which transformers takes them: the first that is there counts.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
CONFIGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TOKENIZER = ("tokenizer.json", *CONFIGS, "chat_template.jinja")
VOCABULARY = ("vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "vocab.txt")  # without tokenizer.json
# Keys of configs that say who saved them, from where, and in which dtype, which model.target.dtype decides.
SAVED_BY = {"transformers_version", "_name_or_path", "name_or_path", "torch_dtype", "dtype", "is_local", "backend"}
JSON = "json:"  # before the hash of a config's values; earlier versions hashed its bytes
WHOLE = 2**30  # bytes; of a larger file, pieces are hashed
PIECE, STRIDE = 2**20, 2**24  # bytes
# Entries of an identity that name a place on the Hub; the others are content.
PLACES = {"repository", "commit", "tokenizer"}
Find = Callable[[str], Path | None]


def in_directory(directory: Path) -> Find:
    """Finds the files of a local model by name."""
    return lambda name: directory / name if (directory / name).is_file() else None


def on_hub(repository: str, revision: str | None) -> Find:
    """Finds the files of a model on the Hub by name: in the cache, or downloaded.

    A file that can neither be found nor downloaded is one that loading the model does not read either.
    """

    def find(name: str) -> Path | None:
        try:
            found = cached_file(repository, name, revision=revision)
        except OSError:
            return None
        return Path(found) if found else None

    return find


def target_files(find: Find) -> list[Path]:
    """The files that loading a model and its tokenizer reads."""
    weights = next((file for name in WEIGHTS if (file := find(name))), None)
    files = [] if weights is None else [weights]
    if weights is not None and weights.name.endswith(".index.json"):
        files += _there(find, sorted(set(_weight_map(weights).values())))
    return [*_there(find, MODEL), *files, *tokenizer_files(find)]


def tokenizer_files(find: Find) -> list[Path]:
    """The files that loading a tokenizer reads."""
    return _there(find, TOKENIZER if find("tokenizer.json") else TOKENIZER + VOCABULARY)


def hashes(files: list[Path]) -> dict[str, str]:
    """File name -> SHA-256 of its content; of a config, of its values."""
    return {file.name: _content(file) for file in files}


def comparable(then: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """An earlier identity of a target, in which what it does not know is taken to be as it is now.

    Where both hold content, content alone counts: neither the name on the Hub nor the commit, which changes with any
    file of the repository. An earlier version knew a target on the Hub by its name and commit, or by its name alone.
    """
    found: dict[str, Any] = {}
    for other in (False, True):  # the target, and a tokenizer that is not the target's
        parts = [{k: v for k, v in of.items() if (k.partition("/")[0] == "tokenizer") is other} for of in (then, now)]
        found |= _comparable(*parts)
    return found


def _comparable(then: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    content = {key: value for key, value in then.items() if key not in PLACES}
    places = {key: value for key, value in now.items() if key in PLACES}
    if content and len(places) < len(now):
        return {k: now[k] if _is_other_hash(v, now.get(k)) else v for k, v in content.items()} | places
    if then and places:
        return now | {key: value for key, value in then.items() if value is not None}
    return then


def _is_other_hash(then: Any, now: Any) -> bool:
    """Whether an earlier version has hashed the bytes of a config, and this one its values."""
    return str(now).startswith(JSON) and not str(then).startswith(JSON)


def short(value: Any) -> str:
    """A value of an identity as text, hashes cut to 12 digits."""
    digits = value.removeprefix(JSON) if isinstance(value, str) else ""
    return digits[:12] if len(digits) == 64 else str(value)


def _there(find: Find, names: tuple[str, ...] | list[str]) -> list[Path]:
    return [file for name in names if (file := find(name))]


def _weight_map(index: Path) -> dict[str, str]:
    """Which file holds which tensor; nothing where the index is damaged: the model will not load."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _content(file: Path) -> str:
    """Of a large file: its size, and a piece out of every 16 MiB. Training a model further changes all of them."""
    if file.name in (*MODEL, *CONFIGS) and file.suffix == ".json" or file.name.endswith(".index.json"):
        return _values(file)
    length = file.stat().st_size
    if length < WHOLE:
        return file_sha256(file)
    sha256 = hashlib.sha256(str(length).encode())
    with file.open("rb") as content:
        for start in (*range(0, length, STRIDE), length - PIECE):
            content.seek(start)
            sha256.update(content.read(PIECE))
    return sha256.hexdigest()


def _values(file: Path) -> str:
    """Of a JSON file: its values in any order, without those that say who saved it."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return file_sha256(file)  # damaged; loading it will say so
    if file.name.endswith(".index.json"):
        found = _weight_map(file)
    text = json.dumps(_without_origin(found), sort_keys=True)
    return JSON + hashlib.sha256(text.encode()).hexdigest()


def _without_origin(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_origin(part) for key, part in value.items() if key not in SAVED_BY}
    return [_without_origin(part) for part in value] if isinstance(value, list) else value
