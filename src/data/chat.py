"""Chat template and supervision: which tokens of a conversation the assistant itself would write."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from data.conversations import Messages
from data.errors import UserError


@dataclass
class Document:
    """One conversation as tokens."""

    input_ids: np.ndarray  # [tokens] int32
    supervised: np.ndarray  # [tokens] bool: written by the assistant, the end-of-turn token included


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages, template_kwargs: dict[str, Any]) -> list[int]:
    """Tokens up to the point where the assistant starts to write."""
    text = _render(tokenizer, messages, template_kwargs, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, template_kwargs: dict[str, Any]
) -> Document:
    """Tokens and supervision of a conversation under the target's own chat template.

    Templates with `{% generation %}` markers say which tokens the assistant writes. For the others, the assistant's
    span is what the rendered conversation adds to the rendered prompt before it, up to the end-of-turn token.

    Raises:
        UserError: the tokenizer has no chat template.
    """
    if "{% generation" in chat_template(tokenizer) or "{%- generation" in chat_template(tokenizer):
        encoded = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **template_kwargs
        )
        return Document(np.array(encoded["input_ids"], np.int32), np.array(encoded["assistant_masks"], bool))

    text = _render(tokenizer, messages, template_kwargs)
    spans = [
        span for i in range(len(messages)) if (span := _assistant_span(tokenizer, messages, i, text, template_kwargs))
    ]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = np.array(encoded["offset_mapping"]).reshape(-1, 2)
    supervised = np.zeros(len(offsets), bool)
    for start, end in spans:
        supervised |= (offsets[:, 0] >= start) & (offsets[:, 1] <= end) & (offsets[:, 0] < offsets[:, 1])
    return Document(np.array(encoded["input_ids"], np.int32), supervised)


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template.

    Raises:
        UserError: it has none.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"The tokenizer of {tokenizer.name_or_path!r} has no chat template. Use the instruction-tuned target, "
            "or save a chat template with its tokenizer."
        )
    return tokenizer.chat_template


def _render(tokenizer, messages: Messages, template_kwargs: dict[str, Any], **kwargs: Any) -> str:
    chat_template(tokenizer)
    return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs, **template_kwargs)


def _assistant_span(tokenizer, messages: Messages, turn: int, text: str, template_kwargs) -> tuple[int, int] | None:
    """Characters of `text` that the assistant wrote in `turn`, or None if decoding would not have led there.

    Some templates render earlier turns differently from the last one (Qwen3 drops their reasoning): such a turn is
    not what the target would have seen or said, so it goes unsupervised.
    """
    if messages[turn]["role"] != "assistant" or turn == 0:
        return None  # nothing was asked: decoding never starts from an empty conversation
    prompt = _render(tokenizer, messages[:turn], template_kwargs, add_generation_prompt=True)
    answered = _render(tokenizer, messages[: turn + 1], template_kwargs)
    if not text.startswith(prompt) or not text.startswith(answered) or len(answered) <= len(prompt):
        return None
    end_token = tokenizer.eos_token or ""
    end = answered.rfind(end_token, len(prompt)) if end_token else -1
    return len(prompt), end + len(end_token) if end >= 0 else len(answered)
