"""Renders the prompt of every answer in a conversation, in linear time if the template allows it.

Rendering each prompt from scratch takes time quadratic in the number of turns. With most templates, however, a prompt
equals the previous prompt with an answer and the next question inserted before the generation prompt. In long
conversations, only the inserted text is therefore rendered. The first `CHECKED` of the resulting prompts, the last one
and a few in between are compared with prompts rendered from scratch. If any of them differs, all prompts are rendered
from scratch.
"""

from collections.abc import Callable, Iterator

from data.errors import BadRecord
from data.sources.records import Messages

Render = Callable[[Messages, bool], str]  # (messages, add_generation_prompt) -> text
CHECKED = 16


def prompts(render: Render, messages: Messages, turns: list[int]) -> Iterator[str]:
    """Yield the prompt of each answer in `turns`, the ascending message indices of the answers.

    Raises:
        BadRecord: the template rejects the conversation.
    """
    inserted = _inserted(render, messages, turns) if len(turns) > CHECKED else None
    if inserted is not None and _agrees(render, messages, turns, inserted):
        yield from _assembled(render(messages[: turns[0]], True), *inserted)
    else:
        for turn in turns:
            yield render(messages[:turn], True)


def question(messages: Messages, turn: int) -> Messages:
    """Return the last user turn before an answer and, if tools were called since, the last calls with their results."""
    first = next((i for i in reversed(range(turn)) if messages[i]["role"] == "user"), 0)
    calls = next((i for i in reversed(range(first, turn)) if messages[i]["role"] == "assistant"), first + 1)
    return [messages[first], *messages[calls:turn]]


def _inserted(render: Render, messages: Messages, turns: list[int]) -> tuple[str, list[str]] | None:
    """Return the generation prompt and the text that each later prompt inserts before it.

    Return None if the template does not simply insert text, or rejects the inserted turns without the earlier ones.
    """
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
        return None  # rejected without the earlier turns
    return generation_prompt, found


def _generation_prompt(render: Render, messages: Messages) -> str:
    """Return the generation prompt: the text that the template appends for `add_generation_prompt`."""
    without, prompt = render(messages, False), render(messages, True)
    return prompt[common_prefix(without, prompt) :]


def _assembled(first: str, generation_prompt: str, inserted: list[str]) -> Iterator[str]:
    history = first.removesuffix(generation_prompt)
    yield first
    for text in inserted:
        history += text
        yield history + generation_prompt


def _agrees(render: Render, messages: Messages, turns: list[int], inserted: tuple[str, list[str]]) -> bool:
    """Spot-check that assembled prompts match rendered ones: the first `CHECKED`, the last, those at powers of two."""
    checked = {*range(CHECKED), *(1 << power for power in range(len(turns).bit_length())), len(turns) - 1}
    assembled = enumerate(_assembled(render(messages[: turns[0]], True), *inserted))
    return all(prompt == render(messages[: turns[i]], True) for i, prompt in assembled if i in checked)


def common_prefix(a: str, b: str) -> int:
    """Return the length of the longest common prefix of two strings, found by bisection."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
