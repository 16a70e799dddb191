"""Checks the questions of held-out prompts and benchmarks before the target answers them."""

from dataclasses import replace

from data.preprocess.chat_template import ChatEncoder
from data.sources.records import Conversation

ANSWER = {"role": "assistant", "content": "Yes."}  # in place of the target's answers


def first_prompt_length(encoder: ChatEncoder, conversation: Conversation) -> int:
    """Return the number of tokens in the prompt of the first user turn, after checking that all turns can be asked.

    Args:
        encoder: the target's chat template and tokenizer.
        conversation: user turns, optionally after a system message; answers between them are optional.

    Raises:
        BadRecord: a turn contains one of the target's special tokens, or the chat template rejects the conversation.
    """
    messages = conversation.messages
    first = next(turn for turn, message in enumerate(messages) if message["role"] == "user") + 1
    asked = messages[:first]
    for message in messages[first:]:
        both = message["role"] == asked[-1]["role"] == "user"
        asked = [*asked, ANSWER, message] if both else [*asked, message]
    encoder.prompt(replace(conversation, messages=asked))
    return len(encoder.prompt(replace(conversation, messages=messages[:first])))
