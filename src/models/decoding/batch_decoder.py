"""Batched decoding loop: draft, verify and commit for all rows in flight, one step at a time."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.acceptance import mean_acceptance_length
from models.decoding.forward_passes import ForwardPasses, contiguous_copy, prefill
from models.decoding.generation_settings import SequenceState
from models.decoding.kv_cache import KVCache
from models.decoding.sampling import Sampling
from models.decoding.selection import Selection, drafts_and_confidence
from models.decoding.target_sampler import SequentialTargetSampler, TargetSampler
from models.draft import DraftModel

# Maps a phase name to a context manager that wraps the phase, for timing.
Timer = Callable[[str], AbstractContextManager]
PHASES = ("prefill", "verify", "draft", "calibrate")
ROW_TENSORS = ("lengths", "generated", "bonus", "drafts", "verified")  # of BatchDecoder, indexed by position in `rows`


def no_timer(phase: str) -> AbstractContextManager:
    """Time nothing."""
    return nullcontext()


@dataclass(frozen=True)
class Step:
    """Result of one verify step for one row."""

    verified: int  # drafts that the target scored
    accepted: int  # leading drafts that equal the target's choices and were committed


@dataclass
class GenerationResult:
    """Generated tokens and verify steps, per row."""

    tokens: list[list[int]]  # new tokens, including the stop token
    steps: list[list[Step]]

    def accepted(self) -> list[int]:
        """Return the number of accepted drafts in each verify step, row by row."""
        return [step.accepted for row in self.steps for step in row]

    @property
    def tau(self) -> float:
        """τ: mean acceptance length over all verify steps of all rows."""
        return mean_acceptance_length(self.accepted())


class Streamer(Protocol):
    """The interface of transformers' `BaseStreamer`."""

    def put(self, value: Tensor) -> None:
        """Receive a prompt [1, tokens] or a new token [1], on the CPU."""

    def end(self) -> None:
        """Signal the end of the sequence."""


class Row:
    """A prompt, its random seed, and the tokens generated for it so far."""

    def __init__(
        self, prompt: list[int], seed: int, state: SequenceState | None = None, streamer: Streamer | None = None
    ) -> None:
        """
        Args:
            state: logits processors and stopping criteria, if there are any.
            streamer: receives the prompt now, and each token once it is final.
        """
        self.prompt, self.seed, self.state = prompt, seed, state
        self.tokens: list[int] = []  # new tokens, including the stop token
        self.steps: list[Step] = []
        self.ended = False
        self._streamer, self._streamed = streamer, 0
        if streamer is not None:
            streamer.put(torch.tensor([prompt]))

    def stream(self, tokens: list[int], ended: bool) -> None:
        """Stream the tokens that have not been streamed yet. `tokens` holds all final tokens so far."""
        if self._streamer is None:
            return
        for token in tokens[self._streamed :]:
            self._streamer.put(torch.tensor([token]))
        self._streamed = len(tokens)
        if ended:
            self._streamer.end()


@dataclass(frozen=True)
class Settings:
    """The models and how to decode with them; the same for all rows in flight."""

    target: PreTrainedModel
    draft: DraftModel | None
    max_new_tokens: int
    sampling: Sampling
    selection: Selection
    stop: set[int]
    calibrate: bool
    parallel_rows: int  # draft in parallel mode while at most this many rows are in flight
    timer: Timer
    growing: int | None = None  # rows grow up to this many tokens; None: allocate all of a row at its start

    def sampler(self, rows: list[Row]) -> TargetSampler:
        """Return the sampler for these rows. Logits processors and stopping criteria belong to all rows or to none."""
        plain = (self.sampling, [row.seed for row in rows], self.max_new_tokens, self.target.device)
        states = [row.state for row in rows if row.state is not None]
        return SequentialTargetSampler(*plain, states, self.stop) if states else TargetSampler(*plain)


class BatchDecoder:
    """Decoding state of the rows in flight.

    Tensors and the KV cache are indexed by position in `rows`. Finished rows are removed from all of them.
    """

    def __init__(self, settings: Settings, rows: list[Row], *, drafting: bool = True) -> None:
        """Prefill the prompts, choose the first bonus tokens and draft the first blocks.

        Args:
            drafting: whether to draft, if there is a drafter. The attribute may change between steps.
        """
        self.settings, self.target, self.draft = settings, settings.target, settings.draft
        self.max_new_tokens, self.timer = settings.max_new_tokens, settings.timer
        self.drafting = drafting and self.draft is not None
        self.block_size = self.draft.block_size if self.draft else 1
        # A growing cache orders its rows by capacity.
        self.rows = list(rows) if settings.growing is None else sorted(rows, key=lambda row: len(row.prompt))
        self.sampler = settings.sampler(self.rows)
        device, prompts = self.target.device, [row.prompt for row in self.rows]
        self.max_length, self.max_verified = max(map(len, prompts)), 0  # cached tokens in the longest row; most drafts
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)  # [R] cached tokens
        self.generated = torch.zeros_like(self.lengths)  # [R] new tokens before the bonus token
        with self.timer("prefill"):
            logits, self.cache = self._prefill(prompts)
            self.passes = ForwardPasses(self.target, self.draft, self.cache)
            none = self.generated  # zeros: nothing is drafted yet
            drafts = torch.empty(len(prompts), 0, dtype=torch.long, device=device)
            self.bonus = self.sampler.accept(drafts, none, logits[:, None], none)[1]  # [R], at position `lengths`
        self._propose(self._draft_blocks(self.max_length))
        self._commit_step(drafts, kept=none, verified=none)  # commits nothing unless the row ends with its first token

    def _prefill(self, prompts: list[list[int]]) -> tuple[Tensor, KVCache]:
        # Candidates may extend past the last committed token by a block.
        slots = self._slots(len(prompts))
        if self.settings.growing is None:
            capacity = self.max_length + self.max_new_tokens + self.block_size
            return prefill(self.target, prompts, capacity, slots)
        needed = [len(prompt) + self.block_size for prompt in prompts]
        return prefill(self.target, prompts, self.settings.growing + self.block_size, slots, needed)

    def join(self, other: "BatchDecoder") -> None:
        """Take over the rows of another decoder with the same settings."""
        if not other.rows:
            return
        order = self.cache.extend(other.cache)
        indices = torch.tensor(order, device=self.bonus.device)
        self.rows = [(self.rows + other.rows)[index] for index in order]
        for name in ROW_TENSORS:
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)])[indices])
        self.max_verified = max(self.max_verified, other.max_verified)
        self.max_length = max(self.max_length, other.max_length)
        self.sampler.extend(other.sampler)
        self.sampler.keep(indices)

    def step(self) -> None:
        """Verify the candidates of all rows, commit the accepted ones and draft the next blocks."""
        candidates = torch.cat([self.bonus[:, None], self.drafts[:, : self.max_verified]], dim=1)  # [R, C]
        offsets = torch.arange(1 + self.max_verified, device=candidates.device)
        positions, kv_length = self.lengths[:, None] + offsets, self.max_length + len(offsets)
        parallel = self.drafting and len(self.rows) <= self.settings.parallel_rows
        with self.timer("verify"):
            if parallel:
                logits, blocks = self.passes.verify_and_draft(candidates, positions, kv_length)
            else:
                logits = self.passes.verify(candidates, positions, kv_length)
            accepted, self.bonus = self.sampler.accept(candidates[:, 1:], self.verified, logits, self.generated + 1)
            del logits  # free memory before computing the draft logits, which are as large
            self.lengths = self.lengths + accepted + 1
            self.generated = self.generated + accepted + 1
        verified = self.verified
        self._propose(_select_blocks(blocks, accepted) if parallel else self._draft_blocks(kv_length))
        self._commit_step(candidates, accepted + 1, verified)

    def _draft_blocks(self, kv_length: int) -> Tensor | None:
        """Draft one block per row, anchored at its bonus token, in a separate pass. Return hidden states [R, B, H]."""
        if not self.drafting:
            return None
        with self.timer("draft"):
            return self.passes.draft_blocks(self.lengths[:, None], kv_length, self.bonus[:, None])[:, 0]

    def _propose(self, block: Tensor | None) -> None:
        """Set the drafts [R, B-1] and how many of them to verify [R], given blocks [R, B, H] and the bonus tokens."""
        if block is None or self.draft is None:
            self.drafts = self.bonus.new_zeros(len(self.bonus), self.block_size - 1)
            self.verified = torch.zeros_like(self.bonus)
            return
        with self.timer("calibrate"):
            bonus = self.bonus if self.settings.calibrate else None
            self.drafts, confidence = drafts_and_confidence(
                self.draft.block_logits(contiguous_copy(block[:, 1:]), bonus)
            )
            room = self.max_new_tokens - 1 - self.generated  # drafts beyond max_new_tokens would be discarded
            self.verified = self.settings.selection.count(confidence).minimum(room).clamp(min=0)

    def _commit_step(self, candidates: Tensor, kept: Tensor, verified: Tensor) -> None:
        """Commit the first `kept` [R] of each row's candidates [R, C] and remove finished rows.

        Copying the outcome to the host is the only device synchronization in a step, unless tokens are chosen one by
        one.
        """
        outcome = torch.stack([kept, verified, self.bonus, self.verified, self.lengths], dim=1)
        unfinished, lengths, max_verified = [], [], 0
        for index, row in enumerate(torch.cat([outcome, candidates], dim=1).tolist()):
            count, scored, bonus, to_verify, length, *tokens = row
            if self._commit(self.rows[index], tokens[:count], scored, bonus):
                continue
            unfinished.append(index)
            lengths.append(length)
            max_verified = max(max_verified, to_verify)
        self.max_verified, self.max_length = max_verified, max(lengths, default=0)
        self._keep(unfinished, [length + self.block_size for length in lengths])

    def _commit(self, row: Row, tokens: list[int], verified: int, bonus: int) -> bool:
        """Append the tokens committed in a step to the row. Return whether the row has finished."""
        answer, stop = row.tokens, self.settings.stop
        limit = row.state.limit if row.state else self.max_new_tokens
        end = next((i + 1 for i, token in enumerate(tokens) if token in stop), len(tokens))
        if tokens:
            answer += tokens[:end]
            row.steps.append(Step(verified, end - 1))  # drafts after the stop token do not count
        row.ended = bool(answer) and (answer[-1] in stop or len(answer) == limit)
        if not row.ended and (bonus in stop or len(answer) + 1 == limit):
            answer.append(bonus)  # the bonus token is final and ends the row: no verify step needed
            row.ended = True
        row.stream(answer if row.ended else [*answer, bonus], row.ended)
        return row.ended

    def _keep(self, unfinished: list[int], needed: list[int]) -> None:
        """Keep only the rows at positions `unfinished`, and make room for `needed` tokens in each of them."""
        before = len(self.rows)
        slots = self._slots(len(unfinished)) if unfinished else 0
        order = self.cache.keep(unfinished, needed, slots)
        self.rows = [self.rows[index] for index in order]
        if not order or order == list(range(before)):
            return
        indices = torch.tensor(order, device=self.bonus.device)
        for name in ROW_TENSORS:
            setattr(self, name, getattr(self, name)[indices])
        self.sampler.keep(indices)

    def _slots(self, rows: int) -> int:
        """Return the number of cache slots per row for `rows` rows in flight: B * B in parallel mode, otherwise B."""
        size = self.draft.block_size if self.draft else 0
        return size * size if rows <= self.settings.parallel_rows else size


def _select_blocks(blocks: Tensor, number: Tensor) -> Tensor:
    """Select one block per row: [R, g, B, H] and indices [R] -> [R, B, H]."""
    return blocks[torch.arange(len(blocks), device=blocks.device), number]
