"""Read conversations from a JSONL file or a data set on the Hub, checking every record."""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import load_dataset

from data.errors import UserError

Messages = list[dict[str, str]]

ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def read_conversations(path: str, *, split: str = "train", max_records: int | None = None) -> list[Messages]:
    """Conversations of a local `.jsonl` file or of a data set id on the Hub.

    Record shapes: `messages` (role/content) and ShareGPT `conversations` (from/value).

    Raises:
        UserError: nothing there, nothing in it, or a record that is no conversation, named by file and line.
    """
    records = islice(_records(path, split), max_records)
    conversations = [_messages(record, where) for where, record in records]
    if not conversations:
        raise UserError(f"data.path={path} holds no conversation. Expected one JSON object a line with `messages`.")
    return conversations


def read_prompts(path: str, *, max_records: int | None = None) -> list[Messages]:
    """Prompts to decode: records with `messages`, or `turns` of which the first is taken.

    Raises:
        UserError: as for `read_conversations`.
    """
    prompts = []
    for where, record in islice(_records(path, "test"), max_records):
        if "turns" in record:
            record = {"messages": [{"role": "user", "content": turn} for turn in record["turns"][:1]]}
        messages = _messages(record, where)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if messages:
            prompts.append(messages)
    if not prompts:
        raise UserError(f"data.prompts={path} holds no prompt. Expected JSON objects with `turns` or `messages`.")
    return prompts


def _records(path: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, record) pairs of a local file or a Hub data set."""
    file = Path(path)
    if file.is_file():
        return _jsonl_records(file)
    if file.suffix or file.is_absolute() or path.startswith(".") or path.count("/") != 1:
        raise UserError(f"No file at {path}. Give the path of a .jsonl file, or a data set id on the Hub (owner/name).")
    return _hub_records(path, split)


def _jsonl_records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                record = json.loads(line.decode("utf-8"))
            except ValueError as error:
                raise UserError(f"{where}: not a JSON object in UTF-8 ({error}). Mend or remove the line.") from None
            if not isinstance(record, dict):
                raise UserError(f"{where}: expected a JSON object, found {type(record).__name__}.")
            yield where, record


def _hub_records(name: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows: Iterable[dict[str, Any]] = load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"data.path={name}: no file of that name here, and the Hub did not give split {split!r} of it "
            f"({type(error).__name__}: {error}). Check the name, the network and `hf auth login`."
        ) from error
    return ((f"{name}[{i}]", row) for i, row in enumerate(rows))


def _messages(record: dict[str, Any], where: str) -> Messages:
    """Messages of a record in the shape that chat templates take."""
    if record.get("messages"):
        turns = record["messages"]
        role_key, text_key, roles = "role", "content", {role: role for role in ROLES}
    elif record.get("conversations"):
        turns = record["conversations"]
        role_key, text_key, roles = "from", "value", SHAREGPT_ROLES
    else:
        raise UserError(f"{where}: neither `messages` nor `conversations`; the keys are {sorted(record)}.")
    return [_message(turn, role_key, text_key, roles, f"{where}, turn {i}") for i, turn in enumerate(turns, start=1)]


def _message(turn: Any, role_key: str, text_key: str, roles: dict[str, str], where: str) -> dict[str, str]:
    if not isinstance(turn, dict) or role_key not in turn or text_key not in turn:
        raise UserError(f"{where}: expected an object with {role_key!r} and {text_key!r}, found {turn!r:.80}.")
    if turn[role_key] not in roles:
        raise UserError(f"{where}: unknown chat role {turn[role_key]!r}; expected one of {', '.join(roles)}.")
    if not isinstance(turn[text_key], str):
        raise UserError(f"{where}: {text_key!r} must be a string, found {type(turn[text_key]).__name__}.")
    return {"role": roles[turn[role_key]], "content": turn[text_key]}
