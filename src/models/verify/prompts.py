"""Prompts for verification, as token ids: from a file, or built-in questions."""

from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.sources.records import Conversation, prompt
from models.readable import TOKENIZER_FILES, one_line
from models.target import load_tokenizer, vocabulary

QUESTIONS = (
    "Tom has 3 apples and buys 4 more. How many apples does he have?",
    "A train travels 60 miles per hour for 3 hours. How many miles does it travel?",
    "What is the capital of France?",
    "Write a Python function that returns the greatest of three numbers.",
)
RANDOM_TOKENS = 12  # prompt length for a target without a tokenizer


def read_prompts(path: Path) -> list[Conversation]:
    """Read conversations in any format that training supports, each up to and including its last user turn.

    Conversations without answers are cut after the first user turn.

    Raises:
        UserError: the file is missing, unreadable or empty, or a record is not a conversation.
    """
    from data.sources.readers import read_strictly  # imported lazily: loads `datasets`

    return read_strictly(str(path), prompt, split="test", limit=None, setting="--prompts", warn=print)


def find_tokenizer(name: str, revision: str | None) -> PreTrainedTokenizerBase | None:
    """Load the target's tokenizer, or return None if it has none.

    Raises:
        ValueError: the tokenizer files are damaged or incomplete.
    """
    present = [file for file in TOKENIZER_FILES if (Path(name) / file).exists()]
    if Path(name).is_dir() and not present:
        return None
    try:
        tokenizer = load_tokenizer(name, revision=revision)
    except OSError as error:
        if present:
            raise ValueError(
                f"{name}: failed to load the tokenizer from {', '.join(present)} ({one_line(error)})."
            ) from error
        return None
    # Without tokenizer files, transformers returns a tokenizer that has only special tokens.
    if len(tokenizer) > len(tokenizer.all_special_ids):
        return tokenizer
    if present:
        raise ValueError(
            f"{name}: the tokenizer's vocabulary is missing; found only {', '.join(present)}. Copy the missing files."
        )
    return None


def prompt_tokens(
    prompts: list[Conversation] | None, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> list[list[int]]:
    """Encode the prompts, or QUESTIONS if there are none, and return their token ids [prompts][tokens].

    Without a tokenizer, return as many prompts of random tokens as there are questions.

    Raises:
        ValueError: a prompt cannot be encoded, a token has no row in the target's embeddings, or prompts are given but
            there is no tokenizer.
    """
    if tokenizer is None:
        if prompts:
            raise ValueError("The target has no tokenizer, so text prompts cannot be encoded. Remove --prompts.")
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocabulary(target), (len(QUESTIONS), RANDOM_TOKENS), generator=generator).tolist()
    own = [Conversation([{"role": "user", "content": text}]) for text in QUESTIONS]
    found = [_encode(conversation, tokenizer) for conversation in prompts or own]
    for number, tokens in enumerate(found, 1):
        if max(tokens, default=0) >= vocabulary(target):
            raise ValueError(
                f"Prompt {number} contains token id {max(tokens)}; expected [0, {vocabulary(target) - 1}], the rows of "
                "the target's embeddings. Use the target's tokenizer."
            )
    return found


def _encode(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    messages, tools = conversation.messages, cast(Any, conversation.tools)  # annotated with an invariant list type
    try:
        if not tokenizer.chat_template:
            encoded: Any = tokenizer("\n".join(message["content"] for message in messages))
        else:
            encoded = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=True)
        return encoded["input_ids"]
    except Exception as error:  # templates may raise any exception
        raise ValueError(
            f"The target's tokenizer or chat template failed on {messages[-1]['content'][:60]!r}: {error}"
        ) from error
