"""Chat template and supervision: which tokens of a conversation the assistant itself would write."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from typing import Any

import numpy as np
from jinja2 import TemplateError
from tokenizers import Encoding, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from data.errors import BadRecord, UserError
from data.preprocess.templates import check_template_kwargs
from data.sources.records import Messages


@dataclass
class Document:
    """One conversation as tokens."""

    input_ids: np.ndarray  # [tokens] int32
    supervised: np.ndarray  # [tokens] bool: written by the assistant, the end-of-turn token included


@dataclass
class Rendered:
    """One conversation as the target reads it."""

    text: str
    spans: list[tuple[int, int]]  # characters that the assistant writes, one span a turn, end of turn included


class ChatEncoder:
    """A target's chat template and tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any]) -> None:
        """
        Raises:
            UserError: the tokenizer has no chat template, or is not one of the `tokenizers` library.
        """
        if not tokenizer.chat_template:
            raise UserError(
                f"The tokenizer of {tokenizer.name_or_path!r} has no chat template. Use the instruction-tuned target, "
                "or save a chat template with its tokenizer."
            )
        if not tokenizer.is_fast:
            raise UserError(f"The tokenizer of {tokenizer.name_or_path!r} is a slow one; a fast one is needed.")
        self.template = tokenizer.get_chat_template()
        self.variables = {**tokenizer.special_tokens_map, **template_kwargs}
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.special_tokens = sorted(added | set(tokenizer.all_special_tokens))
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.marked = "{% generation" in self.template or "{%- generation" in self.template
        # Without its post-processor: it adds nothing here, but trims white space off the offsets.
        self.backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.backend.post_processor = None
        self.backend.no_truncation()
        self.backend.no_padding()

    def check_kwargs(self, given: dict[str, Any], overrides: list[str], say: Callable[[str], None]) -> None:
        """
        Raises:
            UserError: as for `check_template_kwargs`.
        """
        check_template_kwargs(self.template, given, overrides, say, also=self.variables.keys() - given.keys())

    def prompt(self, messages: Messages) -> list[int]:
        """Tokens up to the point where the assistant starts to write.

        Raises:
            BadRecord: as for `conversation`.
        """
        self._refuse_special_tokens(messages)
        return self.backend.encode(self._text(messages, answer=True), add_special_tokens=False).ids

    def conversation(self, messages: Messages) -> Document:
        """Tokens and supervision of a conversation.

        Raises:
            BadRecord: the template refuses it, or a text holds one of the target's special tokens.
        """
        return self.tokenise([self.render(messages)])[0]

    def render(self, messages: Messages) -> Rendered:
        """Text and supervision of a conversation under the target's own chat template.

        Templates with `{% generation %}` markers say what the assistant writes. For the others, it is what the
        rendered conversation adds to the rendered prompt before it, up to the end-of-turn token.

        Raises:
            BadRecord: as for `conversation`.
        """
        self._refuse_special_tokens(messages)
        if self.marked:
            return Rendered(*self._marked(messages))
        text = self._text(messages)
        spans = [self._span(messages, turn, text) for turn, m in enumerate(messages) if m["role"] == "assistant"]
        return Rendered(text, [span for span in spans if span])

    def fingerprint(self) -> dict[str, Any]:
        """What the tokens of a conversation depend on."""
        dated = {"date": date.today().isoformat()} if "strftime_now" in self.template else {}
        tokens = hashlib.sha256(self.backend.to_str().encode()).hexdigest()
        variables = {"variables": self.variables, "special": self.special_tokens}
        return {"tokenizer": tokens, "template": self.template, **variables, **dated}

    def tokenise(self, rendered: list[Rendered]) -> list[Document]:
        """Documents of rendered conversations; many at a time are faster."""
        encodings = self.backend.encode_batch([r.text for r in rendered], add_special_tokens=False)
        return [self._document(r, encoding) for r, encoding in zip(rendered, encodings, strict=True)]

    def _refuse_special_tokens(self, messages: Messages) -> None:
        for number, message in enumerate(messages, start=1):
            text = message["content"] + message.get("reasoning_content", "")
            found = next((token for token in self.special_tokens if token in text), None)
            if found:  # it would be read as a real end of turn, or the like
                raise BadRecord(f"turn {number}: the text holds the target's special token {found}")

    def _document(self, rendered: Rendered, encoding: Encoding) -> Document:
        straddled = [
            start for start, _ in rendered.spans if encoding.token_to_chars(_token(encoding, start))[0] < start
        ]
        if straddled:
            return self._in_pieces(rendered, straddled)
        supervised = np.zeros(len(encoding), bool)
        for start, end in rendered.spans:
            supervised[_token(encoding, start) : _token(encoding, end)] = True
        return Document(np.array(encoding.ids, np.int32), supervised)

    def _in_pieces(self, rendered: Rendered, cuts: list[int]) -> Document:
        """Decoding tokenises the prompt before the answer exists: where a token would reach from one into the other,
        prompt and answer are tokenised apart."""
        edges = [0, *cuts, len(rendered.text)]
        pieces = [
            Rendered(rendered.text[a:b], [(s - a, e - a) for s, e in rendered.spans if a <= s < b])
            for a, b in pairwise(edges)
        ]
        documents = self.tokenise(pieces)
        return Document(
            np.concatenate([d.input_ids for d in documents]), np.concatenate([d.supervised for d in documents])
        )

    def _text(self, messages: Messages, *, answer: bool = False) -> str:
        return self._rendered(messages, add_generation_prompt=answer)[0][0]

    def _marked(self, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
        (text,), (spans,) = self._rendered(messages, return_assistant_tokens_mask=True)
        return text, [(start, end) for start, end in spans if start < end]

    def _rendered(self, messages: Messages, **how: bool) -> tuple[Any, Any]:
        try:
            return render_jinja_template([messages], chat_template=self.template, **how, **self.variables)
        except TemplateError as error:
            raise BadRecord(f"the target's chat template refuses it: {error}") from error

    def _span(self, messages: Messages, turn: int, text: str) -> tuple[int, int] | None:
        """Characters of `text` that the assistant wrote in `turn`, or None if decoding would not have led there.

        Some templates render earlier turns differently from the last one (Qwen3 drops their reasoning): such a turn
        is not what the target would have seen or said, so it goes unsupervised.
        """
        before = self._text(messages[:turn], answer=True)
        answered = self._text(messages[: turn + 1]) if turn + 1 < len(messages) else text
        if not text.startswith(answered) or not answered.startswith(before) or len(answered) <= len(before):
            return None
        tail = answered[len(before) :]
        ends = [tail.rfind(token) + len(token) for token in self.special_tokens if token in tail]
        # What may follow the end token is the template's layout, such as a line break.
        end = max((end for end in ends if not tail[end:].strip()), default=len(tail))
        return len(before), len(before) + end


def load_encoder(target: dict[str, Any], template_kwargs: dict[str, Any]) -> tuple[ChatEncoder, Any]:
    """Encoder and tokenizer of a target, given its settings (conf/model).

    Raises:
        UserError: the tokenizer does not load, or has no chat template.
    """
    name = target["tokenizer"] or target["name"]
    if name is None:
        raise UserError("model.target.tokenizer is not set, and random weights bring none. Name a tokenizer.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=target["revision"] if name == target["name"] else None)
    except (OSError, ValueError) as error:
        raise UserError(f"model.target.tokenizer={name!r}: the tokenizer did not load. {error}") from error
    return ChatEncoder(tokenizer, template_kwargs), tokenizer


def _token(encoding: Encoding, char: int) -> int:
    """Index of the token that holds a character, or the next one that is held; the token count behind the end."""
    last = encoding.token_to_chars(len(encoding) - 1)[1] if len(encoding) else 0
    for place in range(char, last):
        if (token := encoding.char_to_token(place)) is not None:
            return token
    return len(encoding)
