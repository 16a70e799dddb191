"""Files of an exported drafter: names, config, and the files required for a complete export.

Shared by writing (`export`), loading and verification.
"""

import hashlib
import json
import os
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from data.errors import UserError
from models.draft_config import FLEXDRAFT_KEYS, draft_settings

WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
CARD = "README.md"
DECODER = Path("custom_generate", "generate.py")  # path expected by transformers
OWN_DECODER = Path(__file__).parent / DECODER  # source file copied into exports
RECOMMENDATION = "recommended_decoding.json"  # written by the evaluation, which never changes exported files
EARLIER_RECOMMENDATION = "recommended_decoding"  # key within both settings, written by earlier versions
DECODER_SHA256 = "custom_generate_sha256"  # hash of the exported decoder, stored in config.json

# Files written by an export and its run, and published. Config, decoder and weights (one file, or shards plus index)
# are required; the recommendation is optional; model card and plots are documentation.
PARTS = (CONFIG, RECOMMENDATION, CARD, "*.safetensors", INDEX, "*.png", DECODER.as_posix())
HARMLESS = (".gitattributes", "LICENSE*", ".cache/*", "*/__pycache__/*")  # files added by the Hub, git and Python


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; None if it is missing or unreadable."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty dict if the file is missing, unreadable or holds another type."""
    content = read_json(path)
    return content if isinstance(content, dict) else {}


def why_no_object(path: Path, fix: str = "Correct the file, or export the drafter again.") -> str | None:
    """Return the reason why a file does not contain a JSON object; None if it does."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{path.name}: missing. Pass the directory of an exported drafter."
    except OSError as error:
        return f"{path.name}: not readable ({error.strerror}). {fix}"
    except (ValueError, RecursionError) as error:
        return f"{path.name}: invalid JSON ({error}). {fix}"
    if not isinstance(content, dict):
        return f"{path.name}: contains a JSON {type(content).__name__}; expected an object. {fix}"
    return None


def read_config(directory: Path) -> dict[str, Any]:
    """Read the `config.json` of an exported drafter, without the recommendation that earlier versions added to it.

    Raises:
        UserError: the file is missing, unreadable, or not the config of an exported drafter.
    """
    if reason := why_no_object(directory / CONFIG):
        raise UserError(f"{directory}: not an exported drafter. {reason}")
    config = read_json(directory / CONFIG)
    if draft_settings(config) is None:
        raise UserError(f"{directory}: not an exported drafter. Expected {CONFIG} with {FLEXDRAFT_KEYS[0]}.")
    for key in FLEXDRAFT_KEYS:
        if isinstance(config.get(key), dict):
            config[key].pop(EARLIER_RECOMMENDATION, None)
    return config


def write_object(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically, via a temporary file."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def sha256(path: Path) -> str:
    """Return the SHA-256 hex digest of a small file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def decoder_faults(directory: Path) -> tuple[list[str], list[str]]:
    """Check that the exported decoding code (for plain transformers) is present and unmodified.

    Users run this code with `trust_remote_code=True`, so additional Python files or changes after the export are
    faults. An unmodified file from another version of this project only gives a warning.

    Returns:
        Faults and warnings.
    """
    faults = [
        f"{path.relative_to(directory)}: unexpected code, which transformers may run. Delete the file."
        for path in sorted(directory.rglob("*.py"))
        if path.relative_to(directory) != DECODER
    ]
    file = directory / DECODER
    if not file.is_file():
        return [*faults, f"{DECODER}: missing. Plain transformers needs it for decoding. Export the drafter again."], []
    try:
        found = sha256(file)
    except OSError as error:
        return [*faults, f"{DECODER}: not readable ({error.strerror}). Export the drafter again."], []
    if found == sha256(OWN_DECODER):
        return faults, []
    exported = read_object(directory / CONFIG).get(DECODER_SHA256)
    if exported is not None and found != exported:
        fault = f"{DECODER}: changed after the export (sha256 {found[:12]}, {CONFIG} records {str(exported)[:12]}). "
        return [*faults, f"{fault}Review the code before running it, or export the drafter again."], []
    warning = f"{DECODER}: code of another version of this project. Review it before trusting it, or export again."
    return faults, [warning]


def file_warnings(directory: Path) -> list[str]:
    """Return a warning that lists unexpected files in an export directory, if any."""
    files = [path.relative_to(directory).as_posix() for path in sorted(directory.rglob("*")) if path.is_file()]
    other = [name for name in files if not any(fnmatch(name, pattern) for pattern in PARTS + HARMLESS)]
    return [f"unexpected files: {', '.join(other[:4])}{' ...' * (len(other) > 4)}."] if other else []
