"""Tool schemas and tool calls: parses the forms of public data sets into the form that chat templates expect."""

import ast
import json
from contextlib import suppress
from typing import Any

from data.errors import BadRecord
from data.sources.tags import split_calls

PARAMETERS = ("parameters", "input_schema", "inputSchema")  # keys of a schema
MAX_DEPTH = 100  # levels of nesting in schemas and arguments; Python's JSON encoder fails at about 1,000
CALL_KEYS = {"id", "type", "index", "function"}
FUNCTION_KEYS = {"name", "arguments"}


def read_tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Parse tool schemas into `{"type": "function", "function": {"name": ..., ...}}`, or None if there are none.

    Args:
        value: a list of schemas, in OpenAI's form or as bare functions, or its JSON text.
        where: the record's key, for error messages.

    Raises:
        BadRecord: the value is not a list of functions.
    """
    tools = from_json(value, where) if isinstance(value, str) else value
    if not tools:
        return None
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list):
        raise BadRecord(f"{where}: expected a list of JSON schemas, found {kind(tools)}")
    _check_json(tools, where)
    return [_schema(tool, f"{where}, tool {number}") for number, tool in enumerate(tools, start=1)]


def holds_schemas(value: Any) -> bool:
    """Return whether a value is a tool schema, a list of them, or JSON text of these. Calls and settings are none."""
    if isinstance(value, str):
        if not value.lstrip().startswith(("[", "{")) or not any(name in value for name in ("function", *PARAMETERS)):
            return False
        with suppress(BadRecord):
            return holds_schemas(from_json(value, ""))
        return False
    if isinstance(value, list):
        return bool(value) and all(isinstance(tool, dict | str) and holds_schemas(tool) for tool in value)
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not _is_name(function.get("name")) or "arguments" in function:
        return False
    return function is not value or any(_is_json_schema(function.get(name)) for name in PARAMETERS)


def _is_json_schema(value: Any) -> bool:
    """Return whether a value describes parameters, and does not set them, such as `{"temperature": 1}`."""
    if isinstance(value, str):
        return value.lstrip().startswith("{")
    return isinstance(value, dict) and (
        value.get("type") == "object" or all(isinstance(x, dict) for x in value.values())
    )


def _schema(tool: Any, where: str) -> dict[str, Any]:
    tool = from_json(tool, where) if isinstance(tool, str) else tool
    if not isinstance(tool, dict):
        raise BadRecord(f"{where}: expected a JSON schema, found {kind(tool)}")
    if tool.get("type") not in (None, "function"):
        raise BadRecord(f"{where}: type {tool['type']!r:.40} is not supported; expected 'function'")
    function = tool if tool.get("function") is None else tool["function"]
    if not isinstance(function, dict) or not _is_name(function.get("name")):
        raise BadRecord(f"{where}: expected a function with a `name`")
    function = {key: value for key, value in function.items() if key not in ("type", "function")}
    if "input_schema" in function:  # Anthropic's name for it
        function["parameters"] = function.pop("input_schema")
    if isinstance(function.get("parameters"), str):
        function["parameters"] = from_json(function["parameters"], f"{where}, `parameters`")
    if not isinstance(function.get("parameters"), dict | None):
        raise BadRecord(f"{where}: `parameters`: expected a JSON schema, found {kind(function['parameters'])}")
    return {"type": "function", "function": function}


def read_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Parse tool calls into `{"type": "function", "function": {"name": ..., "arguments": {...}}}`, with `id` if given.

    Args:
        value: a call or a list of calls, in OpenAI's form or as bare name and arguments, or its JSON text. The
            arguments are an object or its JSON text.
        where: the turn, for error messages.

    Raises:
        BadRecord: the value contains no valid calls.
    """
    calls = from_json(value, f"{where}: tool calls") if isinstance(value, str) else value
    calls = [calls] if isinstance(calls, dict) else calls
    _check_json(calls, f"{where}: tool calls")
    if not isinstance(calls, list) or not calls:
        raise BadRecord(f"{where}: expected a list of tool calls, found {kind(calls)}")
    return [_call(call, f"{where}: tool call {number}") for number, call in enumerate(calls, start=1)]


def calls_in_text(text: str, where: str) -> tuple[str, list[dict[str, Any]]]:
    """Split an answer into its text and the calls in its `<tool_call>` blocks, as in Hermes' data sets.

    Raises:
        BadRecord: a block contains no valid call, or text lies between the blocks or after them. Templates write the
            calls at the end of an answer.
    """
    text, blocks, after = split_calls(text)
    if blocks and after:
        raise BadRecord(f"{where}: text between or after `<tool_call>` blocks: {after!r:.40}; remove it or move it")
    return text, [call for block in blocks for call in read_calls(block, where)]


def _call(call: Any, where: str) -> dict[str, Any]:
    call = from_json(call, where) if isinstance(call, str) else call
    if not isinstance(call, dict):
        raise BadRecord(f"{where}: expected an object, found {kind(call)}")
    call = {key: value for key, value in call.items() if value is not None}
    nested = "function" in call
    function = call["function"] if nested else {k: v for k, v in call.items() if k not in CALL_KEYS}
    if not isinstance(function, dict) or not _is_name(function.get("name")):
        raise BadRecord(f"{where}: expected a function with a `name`")
    if unknown := (call.keys() - CALL_KEYS if nested else set()) | (function.keys() - FUNCTION_KEYS):
        raise BadRecord(f"{where}: unknown key `{min(unknown)}`; expected `name` and `arguments`")
    if call.get("type", "function") != "function":
        raise BadRecord(f"{where}: type {call['type']!r:.40} is not supported; expected 'function'")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = from_json(arguments, f"{where}, `arguments`")
    arguments = {} if arguments is None or arguments == [] else arguments
    if not isinstance(arguments, dict):
        raise BadRecord(f"{where}: `arguments`: expected an object, found {kind(arguments)}")
    parsed: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return parsed if call.get("id", "") == "" else parsed | {"id": read_id(call["id"], f"{where}, `id`")}


def read_id(value: Any, where: str) -> str:
    """Return the id of a call as text. Some data sets contain numbers.

    Raises:
        BadRecord: the value is neither text nor an integer.
    """
    if type(value) not in (str, int):
        raise BadRecord(f"{where}: expected a string, found {kind(value)}")
    return str(value)


def from_json(text: str, where: str) -> Any:
    """Parse JSON, or a Python literal of JSON types, which some data sets contain instead.

    Raises:
        BadRecord: the text is neither, or contains a number that is not finite or a lone surrogate.
    """
    if not text.strip():
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        try:
            # As JSON, keys are strings and tuples are lists.
            value = json.loads(json.dumps(ast.literal_eval(text.strip())))
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            raise BadRecord(f"{where}: invalid JSON: {error}") from None
    _check_json(value, where)
    return value


def _check_json(value: Any, where: str) -> None:
    """Check that a value can be written as JSON in UTF-8, as chat templates do."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=True)
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRecord(f"{where}: contains a lone surrogate, which is not valid Unicode") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise BadRecord(f"{where}: not valid JSON: {error}") from None
    if text.count("{") + text.count("[") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise BadRecord(f"{where}: nested deeper than {MAX_DEPTH} levels")


def _depth(value: Any) -> int:
    """Return the number of levels of nesting, without recursion."""
    level, depth = [value], 0
    while level := [x for x in level if isinstance(x, dict | list | tuple)]:
        depth += 1
        level = [child for x in level for child in (x.values() if isinstance(x, dict) else x)]
    return depth


def kind(value: Any) -> str:
    """Return the JSON type of a value for error messages, e.g. `a list`."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    name = names.get(type(value), "null" if value is None else type(value).__name__)
    return f"an empty {name.split()[-1]}" if name in ("a list", "a string") and not value else name


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
