"""Forms of records: finds the turns, the system prompt and the tools of a record in any supported form."""

import json
from dataclasses import replace
from typing import Any

from data.errors import BadRecord
from data.sources.tools import holds_schemas, kind, read_tools
from data.sources.turns import FLAGS, REASONING, Turn, plain_turn, read_flags, read_turn, text_message

LISTS = ("messages", "conversations")
PAIRS = (
    ("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("question", "response"),
    ("instruction", "output"), ("instruction", "response"), ("query", "response"),
    ("query", "answers"),
)  # fmt: skip
CALLS = "answers"  # xLAM's data: a list of calls
INPUTS = ("input", "context")  # appended to an instruction
QUESTIONS, ANSWERS = ({pair[side] for pair in PAIRS} for side in (0, 1))
SYSTEM, TOOLS = ("system", "system_prompt", "system_message"), ("tools", "functions")
INSTRUCTIONS = {
    "instructions",
    "developer",
    "developer_message",
    "system_instruction",
    "system_instructions",
}  # not read
OTHER_TOOLS = {"available_tools", "tool_schemas", "tools_json", "tool_definitions"}  # not read
THOUGHTS = {"cot", "chain_of_thought", "thought", "thoughts", "rationale"}  # not read
KEYS = {*LISTS, "turns", *SYSTEM, *TOOLS, *(key for pair in PAIRS for key in pair)}  # read, among others
BESIDE = {*INPUTS, *INSTRUCTIONS, "history", "turns", *REASONING, *THOUGHTS, *QUESTIONS, *ANSWERS}  # texts
FORMATS = "`messages`, `conversations`, `prompt` and `response`, `question` and `answer`, or `turns`"
# Keys that change the meaning of a record and are not read. Other keys are metadata.
REFUSED = {
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "only text is supported"),
    **dict.fromkeys(("chosen", "rejected"), "preference data are not supported; keep the better answer in `messages`"),
    "documents": "put them into a turn",
    "chat_template": "the target's own template is used",
    "chat_template_kwargs": "set data.template_kwargs",
    **dict.fromkeys(("token_ids", "truncated", "tool_calls", "function_call"), "put it into the assistant turn"),
}


def read_record(record: dict[str, Any]) -> tuple[list[Turn], list[dict[str, Any]] | None]:
    """Return the turns and the tool schemas of a record. Null and empty values count as missing, as in tables.

    Raises:
        BadRecord: the format is unknown, or a key that changes the meaning is not supported.
    """
    given = {key for key, value in record.items() if value is not None and value not in ([], {}, "")}
    _refuse_meaning(record, given)
    turns = _turns(record, given)
    _refuse_unread(record, given, turns)
    if not given.isdisjoint(FLAGS) and not read_flags({key: record[key] for key in FLAGS if key in given}, "record"):
        turns = [replace(turn, trained=False) for turn in turns]
    tools = [(key, read_tools(record[key], f"`{key}`")) for key in TOOLS if key in given]
    tools += [("tools of the system turn", turn.tools) for turn in turns if turn.tools]
    if any(other != tools[0][1] for _, other in tools):
        raise BadRecord(f"{' and '.join(f'`{key}`' for key, _ in tools)} differ; keep one of them")
    schemas = tools[0][1] if tools else None
    _check_tool_choice(record) if schemas else _refuse_other_tools(record, given)
    return _with_system(record, turns), schemas


def _refuse_meaning(record: dict[str, Any], given: set[str]) -> None:
    """Refuse keys that change the meaning of the record, except for values that do not, as in dumps of an API."""
    if record.get("truncated") is False:
        given = given - {"truncated"}
    if refused := REFUSED.keys() & given:
        raise BadRecord(f"`{min(refused)}`: {REFUSED[min(refused)]}")
    label = record.get("label")
    if isinstance(label, bool | int | float) and label == 0 or isinstance(label, str) and label.lower() == "false":
        raise BadRecord(f"`label`={json.dumps(label)}: the answer is undesirable; remove the record")


def _refuse_other_tools(record: dict[str, Any], given: set[str]) -> None:
    """Refuse tool schemas under a key that is not read, as in BFCL's `function`."""
    for key in (key for key in record if key in given and key not in KEYS):
        if key in OTHER_TOOLS or holds_schemas(record[key]):
            raise BadRecord(f"`{key}`: tool schemas are read from `tools`; rename it")


def _check_tool_choice(record: dict[str, Any]) -> None:
    if (choice := record.get("tool_choice")) not in (None, "", "auto", {"type": "auto"}):
        raise BadRecord(f"`tool_choice`={choice!r:.40} is not in the prompt; expected 'auto'; remove the record")


def _turns(record: dict[str, Any], given: set[str]) -> list[Turn]:
    if lists := [key for key in LISTS if key in given]:
        if len(lists) > 1:
            raise BadRecord("`messages` and `conversations`: expected one of them; remove the other")
        return read_turns(record[lists[0]], lists[0])
    if pairs := [pair for pair in PAIRS if given >= set(pair)]:
        return _exchange(record, given, pairs)
    if "turns" in given or record.get("turns") is not None:
        turns = record["turns"]
        if not isinstance(turns, list) or not turns:
            raise BadRecord(f"`turns`: expected a list of user turns, found {kind(turns)}")
        return [Turn(text_message("user", turn, f"turn {number}")) for number, turn in enumerate(turns, start=1)]
    if empty := next((key for key in LISTS if record.get(key) is not None), None):
        return read_turns(record[empty], empty)
    if incomplete := next((pair for pair in PAIRS if given & set(pair)), None):
        present, missing = sorted(incomplete, key=lambda key: key not in given)
        raise BadRecord(f"`{present}` without `{missing}`")
    raise BadRecord(f"expected {FORMATS}; found keys: {', '.join(sorted(map(str, record))) or 'none'}")


def _refuse_unread(record: dict[str, Any], given: set[str], turns: list[Turn]) -> None:
    """Refuse texts beside the turns that are not part of them.

    Copies of a turn or of a part of it are metadata. Beside a list of turns, so are the question that it was made from,
    and a reference answer if the list has an answer at its end.
    """
    lists = [(key,) for key in LISTS if key in given]
    form: tuple[str, ...] = next((keys for keys in (*lists, *PAIRS) if given >= set(keys)), ("turns",))
    unread = BESIDE & given - set(form)
    if not unread:
        return
    if lists:
        unread -= {"reasoning", *THOUGHTS, *QUESTIONS}
        unread -= ANSWERS if turns[-1].message["role"] == "assistant" else set()
    elif form in PAIRS:
        unread -= set() if isinstance(record[form[0]], list) else {*INPUTS, "history"}
        unread -= set() if isinstance(record[form[1]], list) else {*REASONING}
    for key in sorted(unread):
        is_number = key in {"turns", *THOUGHTS} and isinstance(record[key], bool | int | float)
        if not is_number and not _is_copy(key, record[key], turns, record.get(form[0])):
            raise BadRecord(
                f"`{key}` beside `{form[0]}` is not part of the conversation; put it into a turn or remove it"
            )


def _is_copy(key: str, text: Any, turns: list[Turn], question: Any) -> bool:
    """Return whether a text is part of the turns. A question may also be in it, as in filled templates of prompts."""
    if not isinstance(text, str) or (key in ANSWERS | THOUGHTS and turns[-1].message["role"] != "assistant"):
        return False
    asked = [turn.message["content"] for turn in turns if turn.message["role"] == "user"]
    asked += [question] if isinstance(question, str) else []  # without its input
    if key in INSTRUCTIONS:
        asked += [turn.message["content"] for turn in turns if turn.message["role"] in ("system", "developer")]
    last = turns[-1].message
    said = [last["content"], last.get("reasoning_content", "")] if key in ANSWERS | THOUGHTS else asked
    return any(text.strip() in content or (key in QUESTIONS and content in text) for content in said)


def read_turns(turns: Any, key: str) -> list[Turn]:
    """Parse a list of turns, its JSON text, or a table's columns of roles and texts.

    Raises:
        BadRecord: it is none of these, or a turn is invalid.
    """
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError) as error:
            raise BadRecord(f"`{key}`: invalid JSON: {error}") from None
    if isinstance(turns, dict) and turns and all(isinstance(column, list) for column in turns.values()):
        if len({len(column) for column in turns.values()}) > 1:
            raise BadRecord(f"`{key}`: the columns have different lengths")
        turns = [dict(zip(turns, row, strict=True)) for row in zip(*turns.values(), strict=True)]
    if not isinstance(turns, list):
        raise BadRecord(f"`{key}`: expected a list of turns, found {kind(turns)}")
    if not turns:
        raise BadRecord(f"`{key}` is empty")
    found = [plain_turn(turn) or read_turn(turn, f"turn {number}") for number, turn in enumerate(turns, start=1)]
    for number, turn in enumerate(found, start=1):
        turn.number = number
    return found


def _exchange(record: dict[str, Any], given: set[str], pairs: list[tuple[str, str]]) -> list[Turn]:
    """Parse one exchange: each side is a text or, as in TRL, a list of turns. TRL does not train on the first list."""
    asked, answered = pairs[0]
    if other := {name for pair in pairs for name in pair} - {asked, answered}:
        raise BadRecord(
            f"`{min(other)}` beside `{asked}` and `{answered}`: expected one exchange; remove the other key"
        )
    question, answer = record[asked], record[answered]
    if isinstance(question, list):
        before = [replace(turn, trained=False) for turn in read_turns(question, asked)]
    else:
        before = _history(record, given) + [Turn(_question(record, given, asked))]
    if isinstance(answer, list) and answered != CALLS:
        return before + read_turns(answer, answered)
    thought = {key: record[key] for key in REASONING if key in given}
    said = {"tool_calls": answer} if answered == CALLS else {"content": answer}
    after = read_turn({"role": "assistant", **said, **thought}, answered)
    return [*before, after]


def _question(record: dict[str, Any], given: set[str], key: str) -> dict[str, Any]:
    message = text_message("user", record[key], key)
    for name in INPUTS:
        if name in given:
            message["content"] += "\n\n" + text_message("user", record[name], name)["content"]
    return message


def _history(record: dict[str, Any], given: set[str]) -> list[Turn]:
    """Parse Alpaca's `history`: earlier questions and answers."""
    if "history" not in given:
        return []
    found = []
    for pair in record["history"] if isinstance(record["history"], list) else [None]:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRecord("`history`: expected a list of questions and answers")
        found += [
            Turn(text_message(role, text, "history")) for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    return found


def _with_system(record: dict[str, Any], turns: list[Turn]) -> list[Turn]:
    """Prepend a system prompt that is stored beside the turns. An empty system prompt counts as none."""
    if turns[0].message["role"] in ("system", "developer") and not turns[0].message["content"]:
        turns = turns[1:]
    for key in SYSTEM:
        if record.get(key) is None or record[key] == "" or isinstance(record[key], str) and not record[key].strip():
            continue
        message = text_message("system", record[key], key)
        if not turns or turns[0].message["role"] not in ("system", "developer"):
            turns = [Turn(message), *turns]
        elif turns[0].message["content"] != message["content"]:
            raise BadRecord(f"`{key}` and the system turn differ; keep one of them")
    return turns
