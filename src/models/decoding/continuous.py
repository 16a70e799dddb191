"""Continuous batching: a row that ends makes room for the next prompt at once."""

import time
from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from models.decoding.batch_decoder import BatchDecoder, Row, Settings, no_timer
from models.decoding.draft_choice import DraftChoice
from models.decoding.flex import rows_in_parallel
from models.decoding.generation_settings import sequence_states, stop_tokens
from models.decoding.requests import check_length, check_models, parse_prompts, parse_seeds
from models.decoding.sampling import GREEDY, Sampling
from models.decoding.selection import RELEASE, Selection
from models.draft import DraftModel
from models.families import max_text_length

# Prompt tokens to prefill between two steps. Few, because the rows in flight wait; more on a GPU, which needs larger
# passes for full speed.
PREFILL_TOKENS_CPU, PREFILL_TOKENS_GPU = 512, 8192

Key = TypeVar("Key", bound=Hashable)


class ContinuousDecoder(Generic[Key]):
    """Decodes a stream of prompts with up to `max_rows` rows in flight.

    With a drafter, it drafts as long as that is faster than decoding with the target alone (`DraftChoice`). The tokens
    of a prompt are those of `flex.generate` with the same seed. They do not depend on the other prompts, except for
    ties within rounding.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        draft: DraftModel | None = None,
        *,
        max_rows: int,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        selection: Selection = RELEASE,
        stop: set[int] | None = None,
        calibrate: bool = True,
        parallel_rows: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """
        Args: those of `flex.generate`.
            max_rows: maximum number of rows in flight.

        Raises:
            ValueError: the drafter belongs to a different target, or the target has unsupported generation settings.
        """
        check_models(target, draft)
        self.max_rows, self.tokenizer = max_rows, tokenizer
        self.settings = Settings(
            target,
            draft,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            selection=selection,
            stop=stop_tokens(target) if stop is None else stop,
            calibrate=calibrate,
            parallel_rows=rows_in_parallel(target.device) if parallel_rows is None else parallel_rows,
            timer=no_timer,
            growing=max_text_length(target.config, draft.block_size if draft else 0),
        )
        self._prefill_tokens = PREFILL_TOKENS_CPU if target.device.type == "cpu" else PREFILL_TOKENS_GPU
        self._waiting: deque[tuple[Key, Row]] = deque()
        self._in_flight: list[tuple[Key, Row]] = []
        self._decoder: BatchDecoder | None = None
        self._choice = DraftChoice() if draft else None
        self._finished_tokens = 0

    @property
    def active(self) -> int:
        """Prompts that are waiting or in flight."""
        return len(self._waiting) + len(self._in_flight)

    @property
    def new_tokens(self) -> int:
        """Tokens generated so far, for finished prompts and for those in flight."""
        return self._finished_tokens + sum(len(row.tokens) for _, row in self._in_flight)

    def submit(self, key: Key, prompt: list[int], seed: int = 0) -> None:
        """Queue a prompt. `step` returns its answer with `key`.

        Raises:
            ValueError: the prompt is empty, has unknown tokens, or is too long for the target, or the target has
                unsupported generation settings.
        """
        own, new = self.settings, self.settings.max_new_tokens
        prompts = parse_prompts(own.target, [prompt], None)
        check_length(own.target, own.draft, prompts, new)
        (seed,) = parse_seeds([seed], 1)
        states = sequence_states(own.target, prompts, new, own.stop, tokenizer=self.tokenizer)
        self._waiting.append((key, Row(prompts[0], seed, states[0] if states else None)))

    @torch.no_grad()
    def step(self) -> list[tuple[Key, Row]]:
        """Prefill waiting prompts into free rows, then decode one step. Return the rows that ended, with their keys."""
        self._admit()
        if self._decoder and self._decoder.rows:
            self._measured_step(self._decoder)
        ended = [(key, row) for key, row in self._in_flight if row.ended]
        self._in_flight = [(key, row) for key, row in self._in_flight if not row.ended]
        self._finished_tokens += sum(len(row.tokens) for _, row in ended)
        return ended

    def _measured_step(self, decoder: BatchDecoder) -> None:
        """Decode one step, with or without drafts, and measure its speed."""
        if self._choice is None:
            decoder.step()
            return
        rows, before, drafted = list(decoder.rows), self.new_tokens, decoder.drafting
        decoder.drafting = self._choice.choose(len(rows))
        start = time.perf_counter()
        decoder.step()
        if drafted == decoder.drafting:  # the first step after a change still verifies drafts, or has none yet
            seconds = time.perf_counter() - start
            self._choice.record(len(rows), drafted, self.new_tokens - before, seconds)

    def _admit(self) -> None:
        """Prefill the first waiting prompts, up to the free rows and the limit on prompt tokens, but at least one."""
        new: list[Row] = []
        tokens = 0
        while self._waiting and len(self._in_flight) < self.max_rows:
            tokens += len(self._waiting[0][1].prompt)
            if new and tokens > self._prefill_tokens:
                break
            self._in_flight.append(self._waiting.popleft())
            new.append(self._in_flight[-1][1])
        if not new:
            return
        drafting = self._choice is not None and self._choice.choose(len(self._in_flight))
        started = BatchDecoder(self.settings, new, drafting=drafting)
        if self._decoder and self._decoder.rows:
            self._decoder.join(started)
        else:
            self._decoder = started
