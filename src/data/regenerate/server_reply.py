"""Requests to a server with an OpenAI-compatible API, and its replies."""

import json
import re
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
TOKEN_NAME = re.compile(r"token_id:(\d{1,10})")  # token in the log-probabilities of vLLM

LIMIT_REASONS = ("length", "max_tokens", "max_length", "model_length")
CALL_REASONS = ("tool_calls", "tool-calls", "function_call", "tool_use")
END_REASONS = ("stop", *CALL_REASONS, "eos_token", "eos", "end_turn", "stop_sequence")
# The request is retried.
INTERRUPTED = ("none", "abort", "error", "cancelled", "cancel", "timeout", "insufficient_system_resource")
STOP_FIELDS = ("stop_reason", "matched_stop")  # the stop string or token that ended the answer: vLLM, SGLang
# Not a stop string: a stop token, such as <|im_end|>, or a name for the end of an answer.
END_NAME = re.compile(r"<\S*>|\w*(eos|eot|end|stop|finish|complete)\w*|", re.IGNORECASE)
MAX_DEPTH = 100  # of nested tool call arguments; templates and checks are recursive
MAX_ID = 2**31  # exclusive limit of token ids


class UnknownReply(BadRecord):
    """Raised for a reply in a form that is not supported. A retry cannot help; another server may."""


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


def read_reply(
    reply: Any, stop_ids: Collection[int], max_tokens: int | None, stops: Collection[str] = ()
) -> Reply | BadRecord:
    """Parse a reply, or return a BadRecord if the answer cannot be used and a retry cannot help.

    Args:
        reply: the decoded JSON.
        stop_ids: tokens at which the target's generation stops.
        max_tokens: the token limit of the request; None if unknown.
        stops: the stop strings of the request. They cut answers that the target would have continued.

    Raises:
        IncompleteReply: the reply is an error or an interrupted answer, and the request should be retried.
    """
    try:
        if reply.get("error") and not reply.get("choices"):
            raise IncompleteReply(f"the server reports an error: {json.dumps(reply['error']):.300}")
        choice = reply["choices"][0]
        message = _message({"content": choice["text"]} if "text" in choice else choice["message"])
        usage = reply.get("usage") or {}
        token_ids = _token_ids(choice)
        prompt_ids = _ids("prompt_token_ids", reply.get("prompt_token_ids"))
        tokens = _count(usage, "completion_tokens") or len(token_ids or ())
        prompt_tokens = _count(usage, "prompt_tokens") or None
        json.dumps(message, ensure_ascii=False).encode("utf-8")
    except BadRecord as error:
        return error
    except UnicodeEncodeError:
        return BadRecord("the answer contains a lone surrogate, which is not valid Unicode")
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        return UnknownReply(f"no answer in {reply!r:.200} ({type(error).__name__}: {error})")
    if "finish_reason" not in choice:
        return UnknownReply("no finish_reason in the reply")
    ending = str(choice.get("finish_reason")).lower()
    if ending == "content_filter":
        return BadRecord(f"the server ended the answer with finish_reason={ending!r}")
    if ending in INTERRUPTED:
        raise IncompleteReply(f"finish_reason={ending!r}")
    if ending not in LIMIT_REASONS + END_REASONS:
        return UnknownReply(f"finish_reason={ending!r}: expected one of {', '.join(END_REASONS + LIMIT_REASONS)}")
    cut = ending in (*LIMIT_REASONS, "stop_sequence") or _stopped(choice, ending, stop_ids, stops)
    cut = cut or bool(max_tokens and tokens >= max_tokens)  # some servers always return `stop`
    complete = token_ids[-1] in stop_ids if cut and token_ids else not cut
    return Reply(message, complete, tokens, token_ids, prompt_ids, prompt_tokens)


def _stopped(choice: dict[str, Any], ending: str, stop_ids: Collection[int], stops: Collection[str]) -> bool:
    """Return whether a stop string, or a token other than the target's stop tokens, ended the answer.

    True if a stop string of the request may have ended it, and the server does not name what did.
    """
    if stops and ending == "stop" and not any(field in choice for field in STOP_FIELDS):
        return True
    return any(_cuts(choice.get(field), stop_ids, stops) for field in STOP_FIELDS)


def _cuts(stop: Any, stop_ids: Collection[int], stops: Collection[str]) -> bool:
    if isinstance(stop, str):
        return stop in stops or not END_NAME.fullmatch(stop)
    return type(stop) is int and stop not in stop_ids


def _message(answer: dict[str, Any]) -> Message:
    message: Message = {"content": _text(answer.get("content"))}
    # Servers name the reasoning differently; chat templates expect it in `reasoning_content`. Blank text is none.
    reasoning = _text(answer.get("reasoning_content") or answer.get("reasoning")) or _thinking(answer.get("content"))
    if reasoning.strip():
        message["reasoning_content"] = reasoning
    calls = list(answer.get("tool_calls") or ())
    if legacy := answer.get("function_call"):
        calls.append({"type": "function", "function": legacy})
    if calls:
        message["tool_calls"] = [_call(call) for call in calls]
    return message


def _text(content: Any) -> str:
    """Return the text of a message, which may be a list of parts. Parts of type `thinking` are left out."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise UnknownReply(f"{content!r:.60}: expected text or a list of parts")
    kinds = sorted({str(part.get("type")) for part in content} - {"text", "output_text", "thinking"})
    if kinds:
        raise BadRecord(f"the answer has a part of type {kinds[0]!r}; expected text")
    return "".join(part["text"] for part in content if part["type"] != "thinking")


def _thinking(content: Any) -> str:
    """Return the reasoning in the parts of a message. Mistral's servers return it there, as text or as parts."""
    parts = content if isinstance(content, list) else []
    return "".join(_text(part["thinking"]) for part in parts if part.get("type") == "thinking")


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """Return a tool call with its arguments as a mapping, as chat templates expect them."""
    if "function" not in call:
        raise UnknownReply(f"a tool call of type {call.get('type')!r:.40}: expected a function")
    function = call["function"]
    try:
        given = function.get("arguments")  # a JSON text; TGI and Ollama return an object
        arguments = json.loads(given or "{}") if given is None or isinstance(given, str) else given
        arguments = {} if arguments is None else arguments
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict) or _depth_exceeds(arguments, MAX_DEPTH):
        limit = f"at most {MAX_DEPTH} levels deep"
        raise BadRecord(f"the arguments of the tool call to {function['name']!r:.40} are not a JSON object, {limit}")
    found = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return ({"id": call["id"]} if call.get("id") else {}) | found


def _depth_exceeds(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        parents = [item for item in level if isinstance(item, dict | list)]
        level = [item for parent in parents for item in (parent.values() if isinstance(parent, dict) else parent)]
    return bool(level)


def _token_ids(choice: dict[str, Any]) -> list[int] | None:
    """Return the answer's token ids from either of the fields that `ID_FIELDS` asks for, or None."""
    if given := _ids("token_ids", choice.get("token_ids")):
        return given
    logprobs = choice.get("logprobs")
    entries = logprobs.get("content") if isinstance(logprobs, dict) else None  # other forms have no token ids
    names = [entry.get("token") for entry in entries or () if isinstance(entry, dict)]
    tokens = [TOKEN_NAME.fullmatch(name) for name in names if isinstance(name, str)]
    if tokens and len(tokens) == len(entries or ()) and all(tokens):
        return _ids("logprobs", [int(token[1]) for token in tokens if token])
    return None


def _ids(field: str, given: Any) -> list[int] | None:
    """Return a list of token ids, or None if it is absent or empty."""
    if given is None or given == []:
        return None
    if not isinstance(given, list) or not all(type(token) is int and 0 <= token < MAX_ID for token in given):
        raise UnknownReply(f"{field}={given!r:.60}: expected a list of token ids")
    return given


def _count(usage: Any, field: str) -> int:
    """Return a number of tokens, 0 if it is absent."""
    if not isinstance(usage, dict):
        raise UnknownReply(f"usage={usage!r:.60}: expected numbers of tokens")
    given = usage.get(field)
    if given is not None and (type(given) is not int or given < 0):
        raise UnknownReply(f"usage.{field}={given!r:.60}: expected a number of tokens")
    return given or 0
