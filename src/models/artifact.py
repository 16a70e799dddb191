"""The files of an exported drafter: their names, how to read and write the config, and which files are required.

Shared by the code that writes (`export`), loads and verifies drafters.
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
RECOMMENDATION = "recommended_decoding.json"  # written by the evaluation, which never modifies exported files
EARLIER_RECOMMENDATION = "recommended_decoding"  # key in the drafter settings under which earlier versions stored it
DECODER_SHA256 = "custom_generate_sha256"  # hash of the exported decoder, stored in config.json

# Files that training runs and exports write to the directory and that are published. Config, decoder and weights (a
# single file, or shards with an index) are required. The recommendation, model card and plots are optional.
FILES = (CONFIG, RECOMMENDATION, CARD, "*.safetensors", INDEX, "*.png", DECODER.as_posix())
HARMLESS = (".gitattributes", "LICENSE*", ".cache/*", "*/__pycache__/*")  # files added by the Hub, git and Python


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, or None if it is missing or unreadable."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or an empty dict if the file is missing, unreadable or not an object."""
    content = read_json(path)
    return content if isinstance(content, dict) else {}


def why_no_object(path: Path, fix: str = "Correct the file, or export the drafter again.") -> str | None:
    """Return why a file does not contain a JSON object, or None if it does."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{path.name}: missing. Pass the directory of an exported drafter."
    except OSError as error:
        return f"{path.name}: cannot be read ({error.strerror}). {fix}"
    except (ValueError, RecursionError) as error:
        return f"{path.name}: invalid JSON ({error}). {fix}"
    if not isinstance(content, dict):
        return f"{path.name}: contains a JSON {type(content).__name__}; expected an object. {fix}"
    return None


def read_config(directory: Path) -> dict[str, Any]:
    """Read an exported drafter's `config.json`, without the recommendation that earlier versions stored in it.

    Raises:
        UserError: the file is missing, unreadable, or not the config of an exported drafter.
    """
    if reason := why_no_object(directory / CONFIG):
        raise UserError(f"{directory}: not an exported drafter. {reason}")
    config = read_json(directory / CONFIG)
    if draft_settings(config) is None:
        raise UserError(f"{directory}: not an exported drafter. {CONFIG} must contain {FLEXDRAFT_KEYS[0]}.")
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
    """Check that the exported decoder for plain transformers is present and unmodified.

    Users run this code with `trust_remote_code=True`, so extra Python files and edits made after the export are
    reported as errors. An unmodified file from a different version of this project only causes a warning.

    Returns:
        A list of faults and a list of warnings.
    """
    faults = [
        f"{path.relative_to(directory)}: unexpected Python file, which transformers may run. Delete it."
        for path in sorted(directory.rglob("*.py"))
        if path.relative_to(directory) != DECODER
    ]
    file = directory / DECODER
    if not file.is_file():
        return [*faults, f"{DECODER}: missing. Plain transformers needs it to decode. Export the drafter again."], []
    try:
        found = sha256(file)
    except OSError as error:
        return [*faults, f"{DECODER}: cannot be read ({error.strerror}). Export the drafter again."], []
    if found == sha256(OWN_DECODER):
        return faults, []
    exported = read_object(directory / CONFIG).get(DECODER_SHA256)
    if exported is not None and found != exported:
        fault = f"{DECODER}: modified after the export (sha256 {found[:12]}; {CONFIG} has {str(exported)[:12]}). "
        return [*faults, f"{fault}Review the code before running it, or export the drafter again."], []
    warning = f"{DECODER}: from a different version of this project. Review it before running it, or export again."
    return faults, [warning]


def file_warnings(directory: Path) -> list[str]:
    """Return a list with one warning that names the unexpected files in an export directory, or an empty list."""
    files = [path.relative_to(directory).as_posix() for path in sorted(directory.rglob("*")) if path.is_file()]
    other = [name for name in files if not any(fnmatch(name, pattern) for pattern in FILES + HARMLESS)]
    return [f"unexpected files: {', '.join(other[:4])}{' ...' * (len(other) > 4)}."] if other else []
