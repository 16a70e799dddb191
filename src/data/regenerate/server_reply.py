"""Requests to a server with an OpenAI-compatible API, and its replies."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from data.errors import BadRecord
from data.sources.records import Conversation, Message

# Request fields for token ids, best first: vLLM 0.10.2 and later; earlier versions of vLLM; other servers.
ID_FIELDS: tuple[dict[str, Any], ...] = (
    {"return_token_ids": True},
    {"logprobs": True, "return_tokens_as_token_ids": True},
    {},
)
TOKEN_ID = "token_id:"  # noqa: S105  prefix of tokens in the log-probabilities of vLLM


class IncompleteReply(Exception):
    """An incomplete or malformed reply, e.g. from a server stopped during generation. The request is retried."""


@dataclass(frozen=True)
class Reply:
    """An answer of the server."""

    message: Message  # content, and reasoning_content or tool_calls if the server returns them separately
    complete: bool  # False if the answer reached the token limit or a stop string
    tokens: int  # as the server counts them; 0 if unknown
    token_ids: list[int] | None
    prompt_ids: list[int] | None
    prompt_tokens: int | None  # length of the prompt


def request_body(conversation: Conversation) -> dict[str, Any]:
    """Return the request fields of a conversation. Tool calls have their arguments as JSON text, as the API expects."""
    messages = [_with_json_arguments(message) for message in conversation.messages]
    if not conversation.tools:
        return {"messages": messages}
    # `none` puts the tools into the prompt and returns the answer as it is; `auto` needs a parser for the model.
    return {"messages": messages, "tools": conversation.tools, "tool_choice": "none"}


def _with_json_arguments(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = []
    for number, call in enumerate(message["tool_calls"]):
        function = dict(call.get("function", call))
        function["arguments"] = json.dumps(function.get("arguments", {}), ensure_ascii=False)
        calls.append({"id": call.get("id", f"call_{number}"), "type": "function", "function": function})
    return {**message, "tool_calls": calls}


def read_reply(reply: Any, stop_ids: Collection[int]) -> Reply | BadRecord:
    """Parse a reply, or return a BadRecord if the answer cannot be used and a retry cannot help.

    Raises:
        IncompleteReply: the reply is incomplete or malformed, and the request should be retried.
    """
    try:
        choice = reply["choices"][0]
        message = _message({"content": choice["text"]} if "text" in choice else choice["message"])
        ending = choice.get("finish_reason")
        usage = reply.get("usage") or {}
        token_ids = _token_ids(choice)
        tokens = usage.get("completion_tokens") or len(token_ids or ())
        json.dumps(message, ensure_ascii=False).encode("utf-8")
    except BadRecord as error:
        return error
    except UnicodeEncodeError:
        return BadRecord("the answer contains a lone surrogate, which is not valid Unicode")
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise IncompleteReply(f"no answer in the reply ({type(error).__name__}: {error})") from error
    if ending == "content_filter":
        return BadRecord(f"the server ended the answer with finish_reason={ending!r}")
    if ending not in ("stop", "length", "tool_calls", "function_call"):  # e.g. "abort": generation was interrupted
        raise IncompleteReply(f"finish_reason={ending!r}")
    # A stop string, given by regenerate.server.extra, cuts an answer that the target would have continued.
    cut = ending == "length" or isinstance(choice.get("stop_reason"), str)
    complete = not cut or bool(token_ids and token_ids[-1] in stop_ids)
    return Reply(message, complete, tokens, token_ids, reply.get("prompt_token_ids"), usage.get("prompt_tokens"))


def _message(answer: dict[str, Any]) -> Message:
    message: Message = {"content": _text(answer.get("content"))}
    # Servers name the reasoning differently; chat templates expect it in `reasoning_content`. Blank text is none.
    reasoning = _text(answer.get("reasoning_content") or answer.get("reasoning"))
    if reasoning.strip():
        message["reasoning_content"] = reasoning
    calls = list(answer.get("tool_calls") or ())
    if legacy := answer.get("function_call"):
        calls.append({"type": "function", "function": legacy})
    if calls:
        message["tool_calls"] = [_call(call) for call in calls]
    return message


def _text(content: Any) -> str:
    """Return the text of a message, which may be a list of parts."""
    if content is None or isinstance(content, str):
        return content or ""
    kinds = sorted({str(part.get("type")) for part in content} - {"text", "output_text"})
    if kinds:
        raise BadRecord(f"the answer has a part of type {kinds[0]!r}; expected text")
    return "".join(part["text"] for part in content)


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """Return a tool call with its arguments as a mapping, as chat templates expect them."""
    function = call["function"]
    try:
        arguments = json.loads(function.get("arguments") or "{}")
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise BadRecord(f"the arguments of the tool call to {function['name']!r:.40} are not a JSON object")
    found = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return ({"id": call["id"]} if call.get("id") else {}) | found


def _token_ids(choice: dict[str, Any]) -> list[int] | None:
    """Return the answer's token ids from either of the fields that `ID_FIELDS` asks for, or None."""
    if given := choice.get("token_ids"):
        return [int(token) for token in given]
    tokens = [str(entry.get("token")) for entry in (choice.get("logprobs") or {}).get("content") or ()]
    if tokens and all(token.startswith(TOKEN_ID) for token in tokens):
        return [int(token.removeprefix(TOKEN_ID)) for token in tokens]
    return None
