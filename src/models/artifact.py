"""An exported drafter on disk: the names of its files, its config, and which files make it whole.

Writing (`export`), loading and verifying share these definitions.
"""

import hashlib
import json
import os
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from data.errors import UserError

WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
CARD = "README.md"
DECODER = Path("custom_generate", "generate.py")  # where transformers looks for it
OWN_DECODER = Path(__file__).parent / DECODER  # what an export copies there
# Both hold the same settings: the public release's code reads the first, its published checkpoint carries the second.
FLEXDRAFT_KEYS = ("flexdraft_config", "dflash_config")
RECOMMENDED = "recommended_decoding"  # within both
DECODER_SHA256 = "custom_generate_sha256"  # of the decoder that was exported; in config.json

# What an export and its run write, and what is published. Config, decoder and weights (one file, or shards with their
# index) make an artifact whole; card and plots describe it.
PARTS = (CONFIG, CARD, "*.safetensors", INDEX, "*.png", DECODER.as_posix())
HARMLESS = (".gitattributes", "LICENSE*", ".cache/*", "*/__pycache__/*")  # what the Hub, git and Python add


def read_json(path: Path) -> Any:
    """Content of a JSON file; None if it is not there or not readable."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def read_object(path: Path) -> dict[str, Any]:
    """Content of a JSON file that holds an object; an empty one if it holds something else or cannot be read."""
    content = read_json(path)
    return content if isinstance(content, dict) else {}


def why_no_object(path: Path, way_out: str = "Export again, or correct it.") -> str | None:
    """Why a file holds no JSON object; None if it does."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{path.name}: not there. An exported drafter has one; give the directory that holds it."
    except OSError as error:
        return f"{path.name}: not readable ({error.strerror}). {way_out}"
    except (ValueError, RecursionError) as error:
        return f"{path.name}: no valid JSON ({error}). {way_out}"
    if not isinstance(content, dict):
        return f"{path.name}: holds a JSON {type(content).__name__}; expected an object. {way_out}"
    return None


def read_config(directory: Path) -> dict[str, Any]:
    """An artifact's `config.json`.

    Raises:
        UserError: not there, not readable, or not an exported drafter's.
    """
    if reason := why_no_object(directory / CONFIG):
        raise UserError(f"{directory}: no exported drafter there. {reason}")
    config = read_json(directory / CONFIG)
    if draft_settings(config) is None:
        raise UserError(f"{directory}: no exported drafter there ({CONFIG} with {FLEXDRAFT_KEYS[0]} expected).")
    return config


def write_config(directory: Path, config: dict[str, Any]) -> None:
    """Write `config.json`, under a temporary name first."""
    temporary = directory / f".{CONFIG}.tmp"
    temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, directory / CONFIG)


def draft_settings(config: dict[str, Any]) -> dict[str, Any] | None:
    """`flexdraft_config`, under either of its names; None if neither is an object."""
    return next((config[key] for key in FLEXDRAFT_KEYS if isinstance(config.get(key), dict)), None)


def extras(settings: dict[str, Any]) -> dict[str, Any]:
    """What a drafter has beyond the paper's by the settings of its `config.json`, as arguments of `DraftModel`."""
    return {key: settings.get(key, absent) for key, absent in (("bonus_slot", False), ("chain_rank", 0))}


def sha256(path: Path) -> str:
    """Of a small file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def decoder_faults(directory: Path) -> tuple[list[str], list[str]]:
    """The code with which plain transformers decodes must be there, and be what was exported.

    Users run it with `trust_remote_code=True`, so other code beside it, or a change after the export, is a fault. The
    file of another version of this project is not: it gives a warning.

    Returns:
        Faults and warnings.
    """
    faults = [
        f"{path.relative_to(directory)}: code that no export writes, and that transformers may run. Delete the file."
        for path in sorted(directory.rglob("*.py"))
        if path.relative_to(directory) != DECODER
    ]
    file = directory / DECODER
    if not file.is_file():
        return [*faults, f"{DECODER}: missing, with which plain transformers decodes. Export the drafter again."], []
    try:
        found = sha256(file)
    except OSError as error:
        return [*faults, f"{DECODER}: not readable ({error.strerror}). Export the drafter again."], []
    if found == sha256(OWN_DECODER):
        return faults, []
    exported = read_object(directory / CONFIG).get(DECODER_SHA256)
    if exported is not None and found != exported:
        fault = f"{DECODER}: not the code that was exported (sha256 {found[:12]}, {CONFIG} has {str(exported)[:12]}). "
        return [*faults, f"{fault}It was changed since: read it before anyone runs it, or export again."], []
    warning = f"{DECODER}: not this version's code. Read it before you trust it; an export by this version renews it."
    return faults, [warning]


def file_warnings(directory: Path) -> list[str]:
    """Files that no export writes."""
    files = [path.relative_to(directory).as_posix() for path in sorted(directory.rglob("*")) if path.is_file()]
    other = [name for name in files if not any(fnmatch(name, pattern) for pattern in PARTS + HARMLESS)]
    return [f"files that no export writes: {', '.join(other[:4])}{' ...' * (len(other) > 4)}."] if other else []
