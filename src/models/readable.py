"""Reports damaged files by name when transformers fails to load part of a target."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from data.errors import UserError, out_of_memory
from models.artifact import CONFIG, INDEX, WEIGHTS, read_object, why_no_object

CONFIG_FILES = (CONFIG,)
MODEL_FILES = (CONFIG, "generation_config.json", INDEX, "adapter_config.json")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "chat_template.jinja"),
)
REMEDY = "Copy or download it again."


@contextmanager
def reading(name: str, what: str, files: Sequence[str]) -> Iterator[None]:
    """Context manager that converts errors from loading part of a target into errors that name the files.

    Args:
        name: directory or Hub id; files are checked only in local directories.
        what: how error messages refer to this part.
        files: names of the files that transformers reads for this part; missing ones are ignored.

    Raises:
        ValueError: a file is damaged, or transformers cannot use its contents.
        OSError: transformers cannot find a file or reach the Hub.
    """
    faults = damaged(Path(name), files) if Path(name).is_dir() else []
    if faults:
        raise UserError(f"{name}: failed to load the {what}. {' '.join(faults)}")
    try:
        yield
    except (OSError, UserError):
        raise
    except Exception as error:  # transformers and its file parsers raise too many exception types to list
        if out_of_memory(error):
            raise
        found = ", ".join(file for file in files if (Path(name) / file).exists())
        raise UserError(
            f"{name}: failed to load the {what}{f' from {found}' if found else ''} ({one_line(error)}). Check that the "
            "files are complete."
        ) from error


def damaged(directory: Path, files: Sequence[str]) -> list[str]:
    """Return the faults in those files that exist: JSON other than objects, unreadable text or tensors, empty files."""
    present = [directory / file for file in files if (directory / file).exists() or (directory / file).is_symlink()]
    return [fault for path in present if (fault := _fault(path))]


def weight_files(directory: Path) -> list[str]:
    """Return the weight files that transformers reads: a single safetensors file, else shards, else `.bin` files."""
    if (directory / WEIGHTS).exists():
        return [WEIGHTS]
    weight_map = read_object(directory / INDEX).get("weight_map")
    if isinstance(weight_map, dict):
        return sorted({file for file in weight_map.values() if isinstance(file, str)})
    return [file.name for file in sorted(directory.glob("pytorch_model*.bin"))]


def one_line(error: Exception) -> str:
    """Format an exception as type and message on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")


def _fault(path: Path) -> str | None:
    if path.suffix == ".json":
        return why_no_object(path, REMEDY)
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                return None
        if path.suffix in (".txt", ".jinja"):
            path.read_text(encoding="utf-8")
        elif not path.stat().st_size:
            return f"{path.name}: empty file. {REMEDY}"
    except (OSError, UnicodeDecodeError, SafetensorError) as error:
        return f"{path.name}: unreadable ({one_line(error)}). {REMEDY}"
    return None
