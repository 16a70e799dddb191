"""The settings file beside the output: what affects the answers, and whether an earlier run can be continued."""

import hashlib
import json
import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from data.config.compose import plain
from data.errors import UserError
from data.regenerate.conversation import SAMPLING
from data.sources.readers import Source, fingerprint


@dataclass(frozen=True)
class SettingsFile:
    """The settings file of an output."""

    path: Path
    settings: dict[str, Any]  # everything that affects the answers, apart from the questions
    questions: list[Any]  # fingerprint of the data
    written_with: dict[str, Any]

    def changes(self) -> str:
        """Describe the settings that differ from those of the existing file. Empty if there are none, or no file."""
        before, now = self._read().get("settings", self.settings), json.loads(json.dumps(self.settings))
        before = {"encoder": now.get("encoder")} | before  # earlier versions did not record it for servers
        changed = sorted(key for key in now | before if now.get(key) != before.get(key))
        return "; ".join(f"{key}: {before.get(key)} -> {now.get(key)}" for key in changed)

    def discards_output(self) -> bool:
        """Return whether an interrupted run is replacing the output, so that its answers are not used."""
        return "replaces_output" in self._read()

    def restore(self) -> None:
        """Restore the settings of the output, which an interrupted run was to replace."""
        if earlier := self._read()["replaces_output"]:
            self._write(earlier)
        else:
            self.path.unlink()

    def same_questions(self) -> bool:
        """Return whether the output belongs to the same data."""
        return self._read().get("questions") == json.loads(json.dumps(self.questions))

    def write(self, *, replaces_output: bool = False, outcomes: dict[str, int] | None = None) -> None:
        """Write the file at the start of a run and, with the counts by outcome, at its end."""
        content: dict[str, Any] = {"settings": self.settings, "questions": self.questions}
        content["written_with"] = self.written_with
        if replaces_output:
            earlier = self._read()
            content["replaces_output"] = earlier.get("replaces_output", earlier)  # to restore if no answer is kept
        self._write(content if outcomes is None else content | {"outcomes": outcomes})

    def _write(self, content: dict[str, Any]) -> None:
        temporary = self.path.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            os.replace(temporary, self.path)
        except OSError as error:
            raise UserError(
                f"{self.path}: write failed ({error}). All samples written so far are intact. Free up space and run "
                "the same command to resume."
            ) from error

    def _read(self) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            _check(content)
            return dict(content)
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{self.path}: not a settings file ({error}). Restore the file, or set overwrite=true to start over."
            ) from error

    def is_damaged(self) -> bool:
        """Return whether the existing file cannot be read, e.g. because it was edited."""
        try:
            self._read()
        except UserError:
            return True
        return False


def _check(content: Any) -> None:
    """Check the content of a settings file.

    Raises:
        TypeError: the file has no settings, or the settings to restore are not those of a file.
    """
    if not isinstance(content, dict) or not isinstance(content.get("settings"), dict):
        raise TypeError("expected an object with the object `settings`")
    if content.get("replaces_output", {}) != {}:  # {}: the replaced output had no file
        _check(content["replaces_output"])


def settings_file(config: DictConfig, sources: list[Source], path: Path) -> SettingsFile:
    """Collect the settings that affect the answers.

    Raises:
        UserError: the target cannot be loaded.
    """
    return SettingsFile(path, _settings(config), fingerprint(sources), _written_with(config))


def _settings(config: DictConfig) -> dict[str, Any]:
    chosen, target = plain(config, "regenerate")["regenerate"], plain(config, "model")["model"]["target"]
    settings = {key: chosen[key] for key in (*SAMPLING, "backend")}
    settings |= {"seed": config.seed, "template_kwargs": plain(config, "data")["data"]["template_kwargs"]}
    from data.preprocess.chat_template import load_encoder
    from data.sources.hub_commit import commit_of

    if target["name"] is None:
        raise UserError(
            "model.target.name=null: a target with random weights cannot answer. Set it to a path or Hub ID."
        )
    encoder, _ = load_encoder(target, settings["template_kwargs"])
    encoding = encoder.fingerprint()
    settings["date"] = encoding.pop("date", None)  # its own key, so that the error for another day names it
    settings["encoder"] = hashlib.sha256(json.dumps(encoding, default=str).encode()).hexdigest()
    if chosen["backend"] == "server":
        return settings | {"model": chosen["server"]["model"], "extra": chosen["server"]["extra"]}
    try:
        commit = None if Path(target["name"]).is_dir() else commit_of(target["name"], target["revision"])
    except (OSError, ValueError) as error:
        raise UserError(f"model.target.name={target['name']!r}: failed to load the target's config. {error}") from error
    settings["target"] = {"name": target["name"], "commit": commit, "dtype": target["dtype"]}
    files = [f for f in sorted(Path(target["name"]).glob("*")) if f.suffix in (".json", ".safetensors")]
    settings["files"] = {file.name: _sha256(file) for file in files}
    return settings


def _written_with(config: DictConfig) -> dict[str, Any]:
    """Return settings and versions that should not affect the answers but are recorded with them."""
    chosen = plain(config, "regenerate")["regenerate"]
    where = {key: value for key, value in chosen[chosen["backend"]].items() if key != "key_file"}
    where |= {"draft": chosen["draft"]} if chosen["backend"] == "local" else {}
    return {**where, "versions": {name: version(name) for name in ("torch", "transformers")}}


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
