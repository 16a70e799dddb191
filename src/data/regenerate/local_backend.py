"""Local generation backend: this project's decoder with continuous batching, optionally with a drafter."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.errors import BadRecord, UserError
from data.preprocess.chat_template import ChatEncoder
from data.regenerate.conversation import REFUSED, OnFinish, OnTokens, Sample, Sampling, derive_seed
from models.decoding.batch_decoder import Row
from models.decoding.continuous import ContinuousDecoder
from models.decoding.flex import check_untested
from models.decoding.sampling import Sampling as TokenSampling
from models.decoding.weight_layout import store_by_columns
from models.draft import DraftModel
from models.export import load_draft, recommended
from models.families import check_architecture, max_text_length
from models.target import load_config, load_target

OTHER_BACKEND = "Regenerate with a server (regenerate.backend=server)."


class LocalBackend:
    """Generates answers with the target in this process.

    The answers do not depend on each other, on their order or on the batch size, except for ties within rounding.
    """

    def __init__(
        self, target: dict[str, Any], tokenizer: PreTrainedTokenizerBase, encoder: ChatEncoder, sampling: Sampling,
        *, batch_size: int, device: str, draft: str | None = None,
    ) -> None:  # fmt: skip
        """Load the target and the drafter.

        Args:
            target: the settings `model.target`.
            batch_size: maximum number of conversations in flight.
            draft: directory or Hub id of an exported drafter of this target; None: decode with the target alone.

        Raises:
            UserError: the target cannot be loaded or is not supported, the drafter is damaged or belongs to another
                target, or `max_new_tokens` leaves no room for a prompt.
        """
        self.tokenizer, self.encoder, self.sampling = tokenizer, encoder, sampling
        self.target = _load(target, tokenizer, device)
        settings: dict[str, Any] = {}
        self.draft: DraftModel | None = None
        if draft:
            self.draft, settings = _load_draft(draft, self.target)
        positions = max_text_length(self.target.config, self.draft.block_size if self.draft else 0)
        self.limit = positions - sampling.max_new_tokens  # maximum prompt length in tokens
        if self.limit < 1:
            raise UserError(
                f"regenerate.max_new_tokens={sampling.max_new_tokens} leaves no room for a prompt: the target's "
                f"context length is {positions}. Reduce regenerate.max_new_tokens."
            )
        ends = self.target.generation_config.eos_token_id or tokenizer.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])
        # Other parameters, e.g. penalties, keep the target's defaults, which decoding with the drafter also uses.
        self.decoder: ContinuousDecoder[int] = ContinuousDecoder(
            self.target,
            self.draft,
            max_rows=batch_size,
            max_new_tokens=sampling.max_new_tokens,
            sampling=TokenSampling(sampling.temperature, top_p=sampling.top_p),
            stop=self.ends,
            tokenizer=tokenizer,
            **settings,
        )

    def run(
        self, samples: Iterable[Sample], on_finish: OnFinish, *, answered_before: bool, on_tokens: OnTokens
    ) -> None:
        """Answer every question in every sample. `answered_before` is ignored."""
        samples, again = iter(samples), deque[Sample]()
        in_flight: dict[int, Sample] = {}
        counted = self.decoder.new_tokens
        while True:
            while len(in_flight) < self.decoder.max_rows and (sample := _next(again, samples)):
                if self._ask(sample):
                    in_flight[id(sample)] = sample
                else:
                    on_finish(sample)
            if not in_flight:
                return
            for key, row in self.decoder.step():
                sample = in_flight.pop(key)
                self._answer(sample, row)
                if sample.outcome:
                    on_finish(sample)
                else:
                    again.append(sample)
            on_tokens(self.decoder.new_tokens - counted)
            counted = self.decoder.new_tokens

    def _ask(self, sample: Sample) -> bool:
        """Submit the sample's next question. If the prompt is invalid or too long, set the outcome and return False."""
        seed = derive_seed(self.sampling.seed, f"{sample.id}/{len(sample.messages)}")
        try:
            prompt = self.encoder.prompt(sample.ask())
            if len(prompt) > self.limit:
                raise BadRecord(
                    f"the prompt has {len(prompt)} tokens, which leaves no room for "
                    f"max_new_tokens={self.sampling.max_new_tokens}"
                )
            self.decoder.submit(id(sample), prompt, seed)
        except (BadRecord, ValueError) as error:  # ValueError: e.g. a token of the tokenizer that the target lacks
            sample.end(f"{REFUSED}: {error}")
            return False
        return True

    def _answer(self, sample: Sample, row: Row) -> None:
        tokens, by_string = row.tokens, row.state is not None and row.state.ends_with_stop_string()
        complete = by_string or (bool(tokens) and tokens[-1] in self.ends)
        # `decode` is annotated to return str or list, but returns a list only for batches.
        text = str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        sample.answer({"content": text}, tokens, complete, len(tokens), self.sampling)


def _next(again: deque[Sample], samples: Iterator[Sample]) -> Sample | None:
    """Return a sample with a further question, which finishes it soonest, otherwise a new one, otherwise None."""
    return again.popleft() if again else next(samples, None)


def _load(settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase, device: str) -> PreTrainedModel:
    """Load the target and check that the decoder supports it.

    Raises:
        UserError: the target cannot be loaded, or is not supported.
    """
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    name, revision = settings["name"], settings["revision"]
    try:
        check_architecture(load_config(name, revision=revision))
        target = load_target(name, revision=revision, dtype=settings["dtype"])
        target.to(torch.device(device))  # type: ignore[arg-type]  # transformers wraps `to`, which hides its signature
    except (OSError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"model.target: failed to load the target. {error}") from error
    # Set by some targets for their own `generate`. A question has one answer, sampled or greedy, without a beam.
    target.generation_config.num_beams = target.generation_config.num_return_sequences = None
    store_by_columns(target)
    try:
        check_untested(target, tokenizer)
    except ValueError as error:
        raise UserError(f"model.target: {error} {OTHER_BACKEND}") from error
    return target


def _load_draft(name: str, target: PreTrainedModel) -> tuple[DraftModel, dict[str, Any]]:
    """Load the drafter and the decoding settings that its evaluation recommends.

    Raises:
        UserError: the drafter is missing, damaged, or belongs to another target.
    """
    try:
        return load_draft(name, target), recommended(name)
    except ValueError as error:
        raise UserError(f"regenerate.draft={name}: {error}") from error
