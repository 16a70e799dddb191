"""Identity of a target: content hashes of the files that transformers reads, independent of their location.

A model loaded by its Hub ID or from any local directory is the same target, even if its configs were re-saved by
a different release of transformers.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from train.run_dir.state import file_sha256

MODEL = ("config.json", "generation_config.json", "adapter_config.json", "adapter_model.safetensors")
# In the order in which transformers looks for them; the first existing file is used.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
CONFIGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TOKENIZER = ("tokenizer.json", *CONFIGS, "chat_template.jinja")
VOCABULARY = ("vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "vocab.txt")  # if tokenizer.json is absent
# Config keys that record how the file was saved: by which version, from where, in which dtype. They are ignored; the
# dtype is set by model.target.dtype.
SAVED_BY = {"transformers_version", "_name_or_path", "name_or_path", "torch_dtype", "dtype", "is_local", "backend"}
JSON = "json:"  # prefix of hashes over a config's values; earlier versions hashed the file's bytes
SAMPLED_FROM = 2**30  # bytes; of files this size or larger, only samples are hashed
PIECE, STRIDE = 2**20, 2**24  # bytes
# Identity keys that give a location on the Hub; all others are content hashes.
PLACES = {"repository", "commit", "tokenizer"}
Find = Callable[[str], Path | None]


def in_directory(directory: Path) -> Find:
    """Return a function that looks up the files of a local model by name."""
    return lambda name: directory / name if (directory / name).is_file() else None


def on_hub(repository: str, revision: str | None) -> Find:
    """Return a function that looks up the files of a Hub model by name, in the cache or by download.

    A file that is neither cached nor downloadable is treated as missing: loading the model could not read it either.
    """

    def find(name: str) -> Path | None:
        try:
            found = cached_file(repository, name, revision=revision)
        except OSError:
            return None
        return Path(found) if found else None

    return find


def target_files(find: Find) -> list[Path]:
    """List the files that are read when a model and its tokenizer are loaded."""
    weights = next((file for name in WEIGHTS if (file := find(name))), None)
    files = [] if weights is None else [weights]
    if weights is not None and weights.name.endswith(".index.json"):
        files += _there(find, sorted(set(_weight_map(weights).values())))
    return [*_there(find, MODEL), *files, *tokenizer_files(find)]


def tokenizer_files(find: Find) -> list[Path]:
    """List the files that are read when a tokenizer is loaded."""
    return _there(find, TOKENIZER if find("tokenizer.json") else TOKENIZER + VOCABULARY)


def hashes(files: list[Path]) -> dict[str, str]:
    """Return the SHA-256 of each file, keyed by file name. Configs are hashed by value, other files by content."""
    return {file.name: _content(file) for file in files}


def comparable(then: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return the earlier identity `then`, completed for comparison with `now`: unknown entries are taken from `now`.

    If both contain content hashes, only those are compared. The Hub name and the commit are not: the commit
    changes with any file in the repository. Earlier versions identified a Hub target by name and commit, or by name
    alone.
    """
    found: dict[str, Any] = {}
    for other in (False, True):  # the target's entries, then those of a separate tokenizer
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
    """Return whether `then` hashes a config's bytes, as in earlier versions, and `now` hashes its values."""
    return str(now).startswith(JSON) and not str(then).startswith(JSON)


def short(value: Any) -> str:
    """Format an identity value as text, with hashes truncated to 12 digits."""
    digits = value.removeprefix(JSON) if isinstance(value, str) else ""
    return digits[:12] if len(digits) == 64 else str(value)


def _there(find: Find, names: tuple[str, ...] | list[str]) -> list[Path]:
    return [file for name in names if (file := find(name))]


def _weight_map(index: Path) -> dict[str, str]:
    """Read the tensor-to-file map of a weight index.

    Return an empty dict if the index is damaged; loading the model will report the error.
    """
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _content(file: Path) -> str:
    """Hash a file: configs and weight indexes by value, other files by content.

    For files of `SAMPLED_FROM` bytes or more, the size, the first 1 MiB of every 16 MiB and the last 1 MiB are hashed.
    This still detects further training, which changes all weights.
    """
    if file.name in (*MODEL, *CONFIGS) and file.suffix == ".json" or file.name.endswith(".index.json"):
        return _values(file)
    length = file.stat().st_size
    if length < SAMPLED_FROM:
        return file_sha256(file)
    sha256 = hashlib.sha256(str(length).encode())
    with file.open("rb") as content:
        for start in (*range(0, length, STRIDE), length - PIECE):
            content.seek(start)
            sha256.update(content.read(PIECE))
    return sha256.hexdigest()


def _values(file: Path) -> str:
    """Hash the values of a JSON file, independent of key order and without the keys in `SAVED_BY`."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return file_sha256(file)  # damaged; loading it will report the error
    if file.name.endswith(".index.json"):
        found = _weight_map(file)
    text = json.dumps(_without_origin(found), sort_keys=True)
    return JSON + hashlib.sha256(text.encode()).hexdigest()


def _without_origin(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_origin(part) for key, part in value.items() if key not in SAVED_BY}
    return [_without_origin(part) for part in value] if isinstance(value, list) else value
