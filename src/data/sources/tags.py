"""Tags in the text of a turn: reasoning, tool calls and tool results, as in Hermes' data sets and Qwen's templates.

All searches are linear in the length of the text.
"""

import json
import re
from collections.abc import Iterator

# Names of reasoning tags. Repetitions are bounded, so that searches are linear.
NAME = r"(?i:[\w:]{0,20}(?:think|thought)\w{0,20}|reasoning|reason|reflection|scratchpad)"


def tag(name: str, slash: str = "") -> str:
    """Return a pattern for a tag in any of the usual brackets: `<name>`, `[name]` or `◁name▷`."""
    return rf"(?:<{slash}{name}>|\[{slash}{name}\]|◁{slash}{name}▷)"


OPENING, CLOSING = tag(NAME), tag(NAME, "/")  # of reasoning
OPENED = re.compile(rf"\s*+{OPENING}")
CLOSED = re.compile(CLOSING)
CALL, CALL_END = "<tool_call>", "</tool_call>"
RESULT, RESULT_END = "<tool_response>", "</tool_response>"
SPACE = re.compile(r"\s*+")
DECODER = json.JSONDecoder()


def split_calls(text: str) -> tuple[str, list[str], str]:
    """Split an answer at its `<tool_call>` blocks. Reasoning contains no calls.

    Returns:
        the text before the blocks, their contents, and the text between and after them. Without blocks, the first is
        the complete text.
    """
    start = _reasoning_end(text)
    kept, blocks = [text[:start]], list[str]()
    for before, block, after in _call_blocks(text, start):
        kept.append(text[start:before])
        blocks.append(block)
        start = after
    kept.append(text[start:])
    return "".join(kept[:2]).strip(), blocks, "".join(kept[2:]).strip()


def without_reasoning(text: str, reasoning: str) -> str | None:
    """Return an answer's text without the block of its reasoning at the start, if it has one.

    Return None if the block holds other reasoning. The prompt may contain the opening tag.
    """
    opened = OPENED.match(text)
    thought, block = reasoning.strip(), text[opened.end() if opened else 0 :].lstrip()
    rest = block[len(thought) :].lstrip() if block.startswith(thought) else ""
    if closed := CLOSED.match(rest):
        return rest[closed.end() :].lstrip("\n")
    return None if opened and CLOSED.search(block) else text


def result_in_text(text: str) -> str:
    """Return the result inside `<tool_response>` tags, which chat templates write themselves."""
    found, start = list[str](), 0
    while (tag := text.find(RESULT, start)) >= 0 and (end := text.find(RESULT_END, tag)) >= 0:
        if text[start:tag].strip():
            return text
        found.append(text[tag + len(RESULT) : end].strip())
        start = end + len(RESULT_END)
    return text if not found or text[start:].strip() else "\n".join(found)


def _reasoning_end(text: str) -> int:
    """Return the index after the reasoning at the start of a text. The prompt may contain its opening tag."""
    closed = CLOSED.search(text)
    if not closed:
        return 0
    before = text[: closed.start()]
    in_call = before.count(CALL) > before.count(CALL_END)  # e.g. a call that writes a file with such a tag
    return 0 if in_call and not OPENED.match(text) else closed.end()


def _call_blocks(text: str, start: int) -> Iterator[tuple[int, str, int]]:
    """Yield the start, content and end of every closed block."""
    while (tag := text.find(CALL, start)) >= 0:
        content = tag + len(CALL)
        end = text.find(CALL_END, _json_end(text, content))
        if end < 0:
            return
        start = end + len(CALL_END)
        yield tag, text[content:end].strip(), start


def _json_end(text: str, start: int) -> int:
    """Return the index after the JSON value at `start` or, if it is not JSON, `start`."""
    space = SPACE.match(text, start)
    try:
        return DECODER.raw_decode(text, space.end() if space else start)[1]
    except (ValueError, RecursionError):
        return start
