"""Compares the prompts that a server decodes from with those of training: another template spoils every answer."""

from data.errors import BadRecord, UserError
from data.preprocess.chat_template import ChatEncoder
from data.regenerate.server_reply import Reply
from data.terminal import say

FIRST = 4  # give up if this many prompts, and no others, have been compared and all of them differ
CONTEXT = 6  # tokens to show before and after the first difference


class PromptCheck:
    """Compares prompts, given as token ids by the server, or at least their lengths, with the encoder's."""

    def __init__(self, encoder: ChatEncoder, url: str) -> None:
        self.encoder, self.url = encoder, url
        self.equal = self.different = self.other_length = 0
        self.difference = ""  # between the last pair of prompts that differ

    def check(self, prompt: list[int], reply: Reply) -> None:
        """Compare one prompt.

        Raises:
            BadRecord: this prompt differs.
            UserError: all of the first prompts differ.
        """
        if reply.prompt_ids is None:
            if reply.prompt_tokens:
                self._check_length(len(prompt), reply.prompt_tokens)
            return
        if reply.prompt_ids == prompt:
            self.equal += 1
            return
        self.different += 1
        self.difference = self._difference(prompt, reply.prompt_ids)
        if self.all_differ and self.different >= FIRST:
            raise self.error()
        raise BadRecord(f"the server decodes from another prompt: {self.difference}")

    @property
    def all_differ(self) -> bool:
        """Whether all prompts compared so far differ."""
        return bool(self.different) and not self.equal

    def error(self) -> UserError:
        """Return the error for a server whose prompts all differ."""
        return UserError(
            f"{self.url} decodes from other prompts than training will use: {self.difference}. Start the server with "
            "the target's own chat template and tokenizer, and check data.template_kwargs."
        )

    def _difference(self, ours: list[int], theirs: list[int]) -> str:
        pairs = zip(ours, theirs, strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
        texts = [
            self.encoder.backend.decode(ids[max(0, first - CONTEXT) : first + CONTEXT], skip_special_tokens=False)
            for ids in (theirs, ours)
        ]
        return f"around token {first}, it has {texts[0]!r}, and the target's template gives {texts[1]!r}"

    def _check_length(self, ours: int, theirs: int) -> None:
        """Warn once if the first prompts all have another length: the server does not show the tokens themselves."""
        self.equal, self.other_length = self.equal + (ours == theirs), self.other_length + (ours != theirs)
        if not self.equal and self.other_length == FIRST:
            say(
                f"warning: {self.url} counts {theirs} tokens in a prompt to which the target's template gives {ours}. "
                "If the server uses another chat template, the answers do not fit the prompts of training."
            )
