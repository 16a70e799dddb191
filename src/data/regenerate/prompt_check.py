"""Compares the prompts that a server decodes from with those of training: another template spoils every answer."""

from data.errors import BadRecord, UserError
from data.preprocess.chat_template import ChatEncoder
from data.regenerate.server_reply import Reply

FIRST = 4  # give up if this many prompts, and no others, have been compared and all of them differ
CONTEXT = 6  # tokens to show before and after the first difference


class PromptCheck:
    """Compares the server's prompts with the encoder's: token ids if the server returns them, otherwise lengths."""

    def __init__(self, encoder: ChatEncoder, url: str) -> None:
        self.encoder, self.url = encoder, url
        self.equal = self.different = 0
        self.difference = ""  # between the last pair of prompts that differ

    def check(self, prompt: list[int], reply: Reply) -> None:
        """Compare one prompt.

        Raises:
            BadRecord: this prompt differs.
            UserError: all of the first prompts differ.
        """
        if reply.prompt_ids is None:
            if reply.prompt_tokens is None:
                return
            equal = reply.prompt_tokens == len(prompt)
        else:
            equal = reply.prompt_ids == prompt
        if equal:
            self.equal += 1
            return
        self.different += 1
        self.difference = self._difference(prompt, reply)
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

    def _difference(self, ours: list[int], reply: Reply) -> str:
        theirs = reply.prompt_ids
        if theirs is None:
            return (
                f"it counts {reply.prompt_tokens} tokens in a prompt to which the target's template gives {len(ours)}"
            )
        pairs = zip(ours, theirs, strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
        texts = [
            self.encoder.backend.decode(ids[max(0, first - CONTEXT) : first + CONTEXT], skip_special_tokens=False)
            for ids in (theirs, ours)
        ]
        return f"around token {first}, it has {texts[0]!r}, and the target's template gives {texts[1]!r}"
