"""Prompts for verification as token ids of the target: from a file, or built-in questions."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from models.readable import TOKENIZER_FILES, one_line
from models.target import load_tokenizer, vocabulary

Messages = list[dict[str, str]]

QUESTIONS = (
    "Tom has 3 apples and buys 4 more. How many apples does he have?",
    "A train travels 60 miles per hour for 3 hours. How many miles does it travel?",
    "What is the capital of France?",
    "Write a Python function that returns the greatest of three numbers.",
)
RANDOM_TOKENS = 12  # prompt length for a target without a tokenizer


def read_prompts(path: Path) -> list[Messages]:
    """Read conversations from a JSONL file, one per line.

    A record holds `messages`, used up to the last user turn, or `turns`, of which the first is used.

    Raises:
        ValueError: the file is missing, unreadable or empty, or a line is not such a record.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as text. {error}") from error
    prompts = [_messages(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise ValueError(f"{path}: no prompt in it; expected one JSON object to a line.")
    return prompts


def find_tokenizer(name: str, revision: str | None) -> PreTrainedTokenizerBase | None:
    """Load the target's tokenizer. Return None if it has none.

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
            raise ValueError(f"{name}: no tokenizer in {', '.join(present)} ({one_line(error)}).") from error
        return None
    # Without tokenizer files, transformers returns a tokenizer with special tokens only.
    if len(tokenizer) > len(tokenizer.all_special_ids):
        return tokenizer
    if present:
        raise ValueError(
            f"{name}: no vocabulary for the tokenizer, only {', '.join(present)}. Copy the other files too."
        )
    return None


def prompt_tokens(
    prompts: list[Messages] | None, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> list[list[int]]:
    """Encode the prompts, or QUESTIONS if there are none: [prompts][tokens].

    Without a tokenizer, return one prompt of random tokens per question.

    Raises:
        ValueError: a prompt cannot be encoded or has a token without a row in the target's embeddings, or prompts are
            given but there is no tokenizer.
    """
    if tokenizer is None:
        if prompts:
            raise ValueError("The target has no tokenizer, so prompts of text cannot be used; leave --prompts out.")
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocabulary(target), (len(QUESTIONS), RANDOM_TOKENS), generator=generator).tolist()
    own = [[{"role": "user", "content": text}] for text in QUESTIONS]
    found = [_encode(messages, tokenizer) for messages in prompts or own]
    for number, tokens in enumerate(found, 1):
        if max(tokens, default=0) >= vocabulary(target):
            raise ValueError(
                f"Prompt {number} has token {max(tokens)} of the target's tokenizer; expected 0 to "
                f"{vocabulary(target) - 1}, the rows of the target's embeddings. Use the target's own tokenizer."
            )
    return found


def _encode(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    try:
        if not tokenizer.chat_template:
            return tokenizer("\n".join(message["content"] for message in messages))["input_ids"]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    except Exception as error:  # a template may raise any exception
        raise ValueError(
            f"The target's tokenizer or chat template refuses {messages[-1]['content'][:60]!r}: {error}"
        ) from error


def _messages(line: str, place: str) -> Messages:
    """Parse the messages of one JSONL line, up to the last user turn. `place` is the file and line for errors.

    Raises:
        ValueError: the line is not valid JSON or not a conversation with a user turn.
    """
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: no valid JSON ({error}).") from error
    record = record if isinstance(record, dict) else {}
    turns, messages = record.get("turns"), record.get("messages")
    if isinstance(turns, list) and turns and isinstance(turns[0], str):
        return [{"role": "user", "content": turns[0]}]
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise ValueError(f"{place}: expected an object with turns (texts) or messages (role and content).")
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not users:
        raise ValueError(f"{place}: no message of a user to answer.")
    return messages[: users[-1] + 1]


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
