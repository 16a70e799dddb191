"""Tool schemas and tool calls: parses the forms of public data sets into the form that chat templates expect."""

import ast
import json
import re
from typing import Any

from data.errors import BadRecord

TEXT_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)  # Hermes and Qwen
TEXT_RESULT = re.compile(r"<tool_response>\s*(.*?)\s*</tool_response>", re.DOTALL)
CALL_KEYS = {"id", "type", "index", "function"}
FUNCTION_KEYS = {"name", "arguments"}


def read_tools(value: Any, key: str) -> list[dict[str, Any]] | None:
    """Parse tool schemas into `{"type": "function", "function": {"name": ..., ...}}`, or None if there are none.

    Args:
        value: a list of schemas, in OpenAI's form or as bare functions, or its JSON text.
        key: the record's key, for error messages.

    Raises:
        BadRecord: the value is not a list of functions.
    """
    tools = from_json(value, f"`{key}`") if isinstance(value, str) else value
    if not tools:
        return None
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list):
        raise BadRecord(f"`{key}`: expected a list of JSON schemas, found {kind(tools)}")
    return [_schema(tool, f"`{key}`, tool {number}") for number, tool in enumerate(tools, start=1)]


def _schema(tool: Any, where: str) -> dict[str, Any]:
    tool = from_json(tool, where) if isinstance(tool, str) else tool
    if not isinstance(tool, dict):
        raise BadRecord(f"{where}: expected a JSON schema, found {kind(tool)}")
    if tool.get("type", "function") != "function":
        raise BadRecord(f"{where}: type {tool['type']!r:.40} is not supported; expected 'function'")
    function = tool.get("function", tool)
    if not isinstance(function, dict) or not _is_name(function.get("name")):
        raise BadRecord(f"{where}: expected a function with a `name`")
    function = {key: value for key, value in function.items() if key != "type"}
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
    if not isinstance(calls, list) or not calls:
        raise BadRecord(f"{where}: expected a list of tool calls, found {kind(calls)}")
    return [_call(call, f"{where}: tool call {number}") for number, call in enumerate(calls, start=1)]


def calls_in_text(text: str, where: str) -> tuple[str, list[dict[str, Any]]]:
    """Split an answer into its text and the calls in its `<tool_call>` blocks, as in Hermes' data sets."""
    found = [call for block in TEXT_CALL.findall(text) for call in read_calls(block, where)]
    return TEXT_CALL.sub("", text).strip(), found


def result_in_text(text: str) -> str:
    """Return the result inside `<tool_response>` tags, which chat templates write themselves."""
    found = TEXT_RESULT.findall(text)
    return "\n".join(found) if found and not TEXT_RESULT.sub("", text).strip() else text


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
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = from_json(arguments, f"{where}, `arguments`")
    if not isinstance(arguments, dict):
        raise BadRecord(f"{where}: `arguments`: expected an object, found {kind(arguments)}")
    parsed: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return parsed | ({"id": call["id"]} if call.get("id") else {})


def from_json(text: str, where: str) -> Any:
    """Parse JSON, or a Python literal, which some data sets contain instead.

    Raises:
        BadRecord: the text is neither.
    """
    if not text.strip():
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise BadRecord(f"{where}: invalid JSON: {error}") from None


def kind(value: Any) -> str:
    """Return the JSON type of a value for error messages, e.g. `a list`."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    name = names.get(type(value), "null" if value is None else type(value).__name__)
    return f"an empty {name.split()[-1]}" if name in ("a list", "a string") and not value else name


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
