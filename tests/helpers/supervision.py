"""Conversations, and a slow and simple reference of their supervised answers under every chat template.

For every answer, the reference gives the tokens of the prompt that decoding starts from, as transformers renders and
tokenizes it, then those of the answer as the target writes it, then the token at which generation stops.
"""

import json
from typing import Any

from helpers.families import FAMILIES, Family

from data.sources.records import Conversation, Messages

Runs = list[tuple[list[int], list[int]]]  # prompt tokens and answer tokens of each answer
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Return the {what}.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
        },
    }
    for name, what in (("get_forecast", "forecast"), ("get_tide", "time of high tide"))
]


def user(number: int) -> dict[str, Any]:
    return {"role": "user", "content": f"How many apples has she after day {number}?"}


def assistant(number: int, reasoning: str | None = None) -> dict[str, Any]:
    answer = {"role": "assistant", "content": f"She has {number}.\n\n{number + 1} tomorrow."}
    return answer | ({"reasoning_content": reasoning} if reasoning else {})


def thinking(number: int) -> dict[str, Any]:
    return {"role": "assistant", "content": f"<think>\nDay {number}: add 1.\n</think>\n\nShe has {number}."}


def calling(number: int, count: int = 1, content: str = "", reasoning: str | None = None) -> dict[str, Any]:
    calls = [
        {
            "type": "function",
            "id": f"call{number:03}{i:02}",
            "function": {"name": ("get_forecast", "get_tide")[i], "arguments": {"city": "São Tomé", "days": number}},
        }
        for i in range(count)
    ]
    message = {"role": "assistant", "content": content, "tool_calls": calls}
    return message | ({"reasoning_content": reasoning} if reasoning else {})


def result(number: int, call: int = 0) -> dict[str, Any]:
    name = ("get_forecast", "get_tide")[call]
    return {"role": "tool", "content": f'{{"{name}": {number}}}', "tool_call_id": f"call{number:03}{call:02}"}


def agent(rounds: int, reasoning: str | None = None) -> Messages:
    """One question that is answered after several rounds of calls and results."""
    called = [m for i in range(rounds) for m in (calling(i, reasoning=reasoning), result(i))]
    return [user(0), *called, assistant(rounds, reasoning)]


SYSTEM = {"role": "system", "content": "Count the apples."}
CONVERSATIONS: dict[str, Messages] = {
    "one turn": [user(0), assistant(0)],
    "many turns": [message for i in range(5) for message in (user(i), assistant(i))],
    "system prompt": [SYSTEM, *(message for i in range(3) for message in (user(i), assistant(i)))],
    "reasoning": [message for i in range(3) for message in (user(i), assistant(i, f"On day {i} she gets 1 more."))],
    "reasoning in the last answer": [user(0), assistant(0), user(1), assistant(1, "1 more.")],
    "reasoning in the text": [message for i in range(3) for message in (user(i), thinking(i))],
}
WITH_TOOLS: dict[str, Messages] = {
    "tools, no call": [SYSTEM, user(0), assistant(0)],
    "one call": [user(0), calling(0)],
    "call, then answer": [user(0), calling(0), result(0), assistant(0)],
    "parallel calls": [user(0), calling(0, 2), result(0), result(0, 1), assistant(0)],
    "text beside a call": [user(0), calling(0, content="Let me see."), result(0), assistant(0)],
    "agent": [*agent(3), *agent(1)],
    "agent with reasoning": [*agent(3, "Look it up."), *agent(1, "Again.")],
}
KNOWS_BLOCKS = {"Qwen3", "Qwen3-Thinking", "QwQ", "DeepSeek-R1-Distill", "Qwen3 without thinking", "Nemotron Nano v2"}
CLOSED = {"Qwen3 without thinking", "SmolLM3 without thinking"}  # the prompt holds an empty reasoning block


def refusal(name: str, conversation: Conversation) -> str | None:
    """Return why a template can render no answer of a conversation, or None."""
    family, messages = FAMILIES[name], conversation.messages
    if family.no_system and messages[0]["role"] == "system" and not conversation.tools:
        return "rejected by the target's chat template: System role not supported"
    if conversation.tools and (family.calls is None or not family.tools and messages[0]["role"] != "system"):
        if family.no_system and messages[0]["role"] == "system":
            return "rejected by the target's chat template: System role not supported"
        return "does not write `tools` into the prompt"
    if family.template.startswith("llama") and any(len(m.get("tool_calls", ())) > 1 for m in messages):
        return "rejected by the target's chat template: This model only supports single tool-calls at once!"
    return None


def expected(name: str, tokenizer: Any, conversation: Conversation) -> tuple[Runs, list[int]]:
    """Return prompt tokens and answer tokens of each answer, and the turn numbers of those that are refused."""
    family, answers, refused = FAMILIES[name], [], []
    messages, options = _given(family, conversation)
    for turn, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        text, end = written(name, message)
        if text is None:
            refused.append(turn + 1)
            continue
        prompt = tokenizer.apply_chat_template(
            messages[:turn], add_generation_prompt=True, tokenize=False, **family.kwargs, **options
        )
        pair = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, text + end)]
        answers.append((pair[0], pair[1]))
    return answers, refused


def written(name: str, message: dict[str, Any]) -> tuple[str | None, str]:
    """Return the answer as the target writes it, or None if it would not write it after its prompt, and its end."""
    family, content, reasoning = FAMILIES[name], message["content"], message.get("reasoning_content")
    if "tool_calls" in message:
        calls = [(c["function"]["name"], c["function"]["arguments"], c["id"]) for c in message["tool_calls"]]
        text = family.calls(content, reasoning, calls) if family.calls else None
        return text, family.call_end or family.end
    if content.startswith("<think>\n") and (name in KNOWS_BLOCKS or name in CLOSED):
        reasoning, content = content.removeprefix("<think>\n").split("\n</think>\n\n")
    return family.writes(content, reasoning), family.end


def _given(family: Family, conversation: Conversation) -> tuple[Messages, dict[str, Any]]:
    """Return the messages and the arguments that the template's documentation asks for."""
    messages = conversation.messages
    if not conversation.tools:
        return messages, {}
    if family.tools:
        return messages, {family.tools: conversation.tools}
    functions = [tool["function"] for tool in conversation.tools]
    return [messages[0] | {"tools": json.dumps(functions)}, *messages[1:]], {}
