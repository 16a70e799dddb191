"""Prompts of the answers of a conversation, rendered in time linear in its length where the template allows.

Rendering every prompt takes time quadratic in the number of turns. Most templates only append: a prompt is the one
before it with an answer and a question inserted before the generation prompt. For long conversations, the inserted text
is rendered from these turns alone, and the resulting prompts are compared with rendered ones: the first `CHECKED`, the
last, and some between them. If any differs, all are rendered.
"""

from collections.abc import Callable, Iterator

from data.errors import BadRecord
from data.sources.records import Messages

Render = Callable[[Messages, bool], str]  # (messages, add_generation_prompt) -> text
CHECKED = 16


def prompts(render: Render, messages: Messages, turns: list[int]) -> Iterator[str]:
    """Yield the prompt of each answer at the message indices `turns`, ascending.

    Raises:
        BadRecord: the template refuses the conversation.
    """
    inserted = _inserted(render, messages, turns) if len(turns) > CHECKED else None
    if inserted is not None and _agrees(render, messages, turns, inserted):
        yield from _assembled(render(messages[: turns[0]], True), *inserted)
    else:
        for turn in turns:
            yield render(messages[:turn], True)


def question(messages: Messages, turn: int) -> Messages:
    """Return the messages before an answer from the last user turn on."""
    first = max((i for i in range(turn) if messages[i]["role"] == "user"), default=0)
    return messages[first:turn]


def _inserted(render: Render, messages: Messages, turns: list[int]) -> tuple[str, list[str]] | None:
    """Return the generation prompt and the text that each prompt inserts before it, or None if one is rewritten."""
    found = []
    try:
        generation_prompt = _generation_prompt(render, question(messages, turns[0]))
        for turn, following in zip(turns, turns[1:], strict=False):
            start = question(messages, turn)
            before = render(start, True).removesuffix(generation_prompt)
            after = render([*start, *messages[turn:following]], True)
            if not (after.startswith(before) and after.endswith(generation_prompt)):
                return None
            found.append(after[len(before) : len(after) - len(generation_prompt)])
    except BadRecord:
        return None  # refused without the turns before it
    return generation_prompt, found


def _generation_prompt(render: Render, messages: Messages) -> str:
    """Return the end of a prompt that only prompts have."""
    without, prompt = render(messages, False), render(messages, True)
    return prompt[common_prefix(without, prompt) :]


def _assembled(first: str, generation_prompt: str, inserted: list[str]) -> Iterator[str]:
    history = first.removesuffix(generation_prompt)
    yield first
    for text in inserted:
        history += text
        yield history + generation_prompt


def _agrees(render: Render, messages: Messages, turns: list[int], inserted: tuple[str, list[str]]) -> bool:
    """Compare assembled prompts with rendered ones: the first ones, the last, and those at powers of two."""
    checked = {*range(CHECKED), *(1 << power for power in range(len(turns).bit_length())), len(turns) - 1}
    assembled = enumerate(_assembled(render(messages[: turns[0]], True), *inserted))
    return all(prompt == render(messages[: turns[i]], True) for i, prompt in assembled if i in checked)


def common_prefix(a: str, b: str) -> int:
    """Return the length of the longest common prefix, by bisection."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
