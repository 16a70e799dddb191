"""Reads single- and multi-turn benchmark prompts from files or Hub datasets."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.errors import BadRecord, UserError
from data.sources.kinds import check_kind, declared
from data.sources.readers import fingerprint, open_sources, read_strictly
from data.sources.records import Conversation, questions

ALL = "all"  # reserved name for all benchmarks combined
KEYS = ("path", "subset", "split", "turns", "template", "kind")


def read_benchmark(
    name: str,
    settings: Any,
    limit: int | None,
    *,
    check: Callable[[Conversation], object] = lambda conversation: None,
    warn: Callable[[str], None] = lambda text: None,
) -> list[Conversation]:
    """Read the system and user turns of the first `limit` conversations in a benchmark, or of all if None.

    Args:
        name: the benchmark.
        settings: `path` of a file, folder or Hub dataset; `subset` and `split` of a Hub dataset. If the records are not
            conversations, also `turns`, the column with the list of user turns, or `template`, a format string that
            builds a single user turn from the columns. Optionally `kind`, the kind of all answers.
        limit: number of conversations.
        check: raises BadRecord for a conversation that the target cannot be asked.
        warn: see `open_sources`.

    Raises:
        UserError: a setting or record is invalid; the message gives the setting's name or the record's location.
    """
    _check(name, settings)
    parse = _parser(settings.get("turns"), settings.get("template"))

    def parse_and_check(record: Any) -> Conversation:
        conversation = parse(record)
        check(conversation)
        return replace(conversation, kind=settings.get("kind") or declared(record))

    setting = f"benchmarks.{name}.path"
    return read_strictly(_source(settings), parse_and_check, split="test", limit=limit, setting=setting, warn=warn)


def benchmark_fingerprint(name: str, settings: Any) -> list[Any]:
    """Return a fingerprint of the questions: file contents and parsing settings, but not paths or mtimes."""
    _check(name, settings)
    given, setting = _source(settings), f"benchmarks.{name}.path"
    sources = open_sources(given, split="test", default_split="test", max_records=None, setting=setting)
    kind = [settings["kind"]] if settings.get("kind") else []
    return [fingerprint(sources), settings.get("turns"), settings.get("template"), *kind]


def _check(name: str, settings: Any) -> None:
    if name == ALL:
        raise UserError(f"benchmarks.{ALL}: the name is reserved for all benchmarks combined. Choose a different one.")
    if not isinstance(settings, dict) or not isinstance(settings.get("path"), str):
        raise UserError(f"benchmarks.{name}={settings!r}: expected at least a path; see conf/benchmarks/.")
    if unknown := sorted(settings.keys() - set(KEYS)):
        raise UserError(f"benchmarks.{name}.{unknown[0]}: no such setting; expected one of {', '.join(KEYS)}.")
    if settings.get("kind") is not None:
        check_kind(settings["kind"], f"benchmarks.{name}.kind")
    if settings.get("turns") and settings.get("template"):
        raise UserError(f"benchmarks.{name}: set either turns or template, not both.")


def _source(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the source without the subset and split of the Hub dataset, if the path was set to a local file."""
    keys = ("path",) if Path(os.path.expanduser(settings["path"])).is_file() else ("path", "subset", "split")
    return [{key: settings[key] for key in keys if settings.get(key)}]


def _parser(turns: str | None, template: str | None) -> Callable[[Any], Conversation]:
    if not turns and not template:
        return questions

    def parse(record: Any) -> Conversation:
        if not isinstance(record, dict):
            raise BadRecord("expected a JSON object")
        try:
            user_turns = [template.format_map(_columns(record)).strip()] if template else record[turns]
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise BadRecord(
                f"`{'template' if template else 'turns'}` does not match the record ({error!r}); "
                f"found keys: {', '.join(map(str, record))}"
            ) from None
        return questions({"turns": user_turns})

    return parse


def _columns(record: dict[str, Any]) -> dict[str, Any]:
    """Convert columns for the template: join lists with newlines and replace null with an empty string."""
    text = {key: "\n".join(map(str, value)) if isinstance(value, list) else value for key, value in record.items()}
    return {key: "" if value is None else value for key, value in text.items()}
