"""What has been done in a run directory: which stages are finished, with which settings, from which inputs."""

import hashlib
import json
import os
import platform
import uuid
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data.errors import UserError


def write_json(path: Path, value: Any) -> None:
    """Write under a temporary name, then rename: a reader sees all of it or none of it."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """What `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def file_sha256(path: Path) -> str:
    """Hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class StageRecord:
    """The record of one stage in `<run>/records/`: `<stage>.begun.json` from its start, `<stage>.done.json` at its end.

    Kept out of the stage's own directory, so that an exported directory holds nothing but the artifact.
    """

    def __init__(self, run_dir: Path, stage: str, settings: dict[str, Any]) -> None:
        self.begun = run_dir / "records" / f"{stage}.begun.json"
        self.done = run_dir / "records" / f"{stage}.done.json"
        self.settings = json.loads(json.dumps(settings))  # as they will be read back

    def finished(self) -> bool:
        """Whether the stage was finished with these settings.

        Raises:
            UserError: it was begun or finished with others.
        """
        for file in (self.done, self.begun):
            if not file.exists():
                continue
            changes = _differences(read_json(file)["settings"], self.settings)
            if changes:
                raise UserError(
                    f"{file}: this stage was run with other settings: {'; '.join(changes)}.\n"
                    "Choose another name=..., or overwrite=true to do the chosen stages again."
                )
        return self.done.exists()

    def begin(self, anew: bool) -> None:
        """Record the settings before the first step. `anew`: what was begun before counts for nothing."""
        self.begun.parent.mkdir(parents=True, exist_ok=True)
        self.done.unlink(missing_ok=True)
        before = read_json(self.begun) if self.begun.exists() and not anew else {}
        identity = {"id": before.get("id", uuid.uuid4().hex[:12])}
        write_json(self.begun, {"settings": self.settings, "environment": environment(), **identity})

    def finish(self, result: dict[str, Any]) -> None:
        """Mark the stage as done."""
        write_json(self.done, {"settings": self.settings, "environment": environment(), "result": result})


def run_id(run_dir: Path, stage: str) -> str | None:
    """What names this run of a stage, the same after every restart; None before its first."""
    begun = run_dir / "records" / f"{stage}.begun.json"
    return read_json(begun)["id"] if begun.exists() else None


def environment() -> dict[str, str]:
    """Versions that a result depends on."""
    packages = ("torch", "transformers", "lightning", "numpy", "deepspeed")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """`key: old -> new` for every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for key in keys for d in _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)]
    return [] if old == new else [f"{path}: {old} -> {new}"]
