"""Batched decoding loop: draft, verify and commit for all rows in flight, one step at a time."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.acceptance import mean_acceptance_length
from models.decoding.forward_passes import ForwardPasses, contiguous_copy, prefill
from models.decoding.generation_settings import SequenceState
from models.decoding.selection import Selection, drafts_and_confidence
from models.decoding.target_sampler import TargetSampler
from models.draft import DraftModel

# Maps a phase name to a context manager that wraps the phase, for timing.
Timer = Callable[[str], AbstractContextManager]
PHASES = ("prefill", "verify", "draft", "calibrate")


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


class Streams:
    """Forwards tokens to the streamer of their row as soon as they are final."""

    def __init__(self, streamers: list[Streamer | None], prompts: list[list[int]]) -> None:
        self._streamers, self._shown = streamers, [0] * len(prompts)
        for streamer, prompt in zip(streamers, prompts, strict=True):
            if streamer is not None:
                streamer.put(torch.tensor([prompt]))

    def show(self, row: int, tokens: list[int], ended: bool) -> None:
        """Stream the tokens that have not been streamed yet. `tokens` holds all new tokens in the row so far."""
        streamer = self._streamers[row]
        if streamer is None:
            return
        for token in tokens[self._shown[row] :]:
            streamer.put(torch.tensor([token]))
        self._shown[row] = len(tokens)
        if ended:
            streamer.end()

    def end(self) -> None:
        """End all streams."""
        for streamer in filter(None, self._streamers):
            streamer.end()


class BatchDecoder:
    """Decoding state of the rows in flight.

    Tensors and the KV cache are indexed by position in `rows`. Finished rows are removed from all of them.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        draft: DraftModel | None,
        result: GenerationResult,
        *,
        max_new_tokens: int,
        sampler: TargetSampler,
        states: list[SequenceState] | None,
        selection: Selection,
        stop: set[int],
        calibrate: bool,
        parallel_rows: int,
        streams: Streams,
        timer: Timer,
    ) -> None:
        """
        Args:
            sampler: selects the target's tokens.
            states: one per row if `sampler` depends on the text so far, otherwise None.
            parallel_rows: draft in parallel mode while at most this many rows are in flight.
        """
        self.target, self.draft, self.result = target, draft, result
        self.max_new_tokens, self.sampler, self.states = max_new_tokens, sampler, states
        self.selection, self.stop, self.calibrate, self.parallel_rows = selection, stop, calibrate, parallel_rows
        self.streams, self.timer = streams, timer

    def start(self, prompts: list[list[int]]) -> None:
        """Prefill the prompts, choose the first bonus tokens and draft the first blocks."""
        device = self.target.device
        size = self.draft.block_size if self.draft else 1
        self.rows = list(range(len(prompts)))  # row indices into the result
        self.max_length = max(map(len, prompts))  # cached tokens in the longest row
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)  # [R] cached tokens
        self.generated = torch.zeros_like(self.lengths)  # [R] new tokens before the bonus token
        capacity = self.max_length + self.max_new_tokens + size  # candidates may extend past the last committed token
        with self.timer("prefill"):
            logits, self.cache = prefill(self.target, prompts, capacity, self._slots(len(prompts)))
            self.passes = ForwardPasses(self.target, self.draft, self.cache)
            none = self.generated  # zeros: nothing is drafted yet
            drafts = torch.empty(len(prompts), 0, dtype=torch.long, device=device)
            self.bonus = self.sampler.accept(drafts, none, logits[:, None], none)[1]  # [R], at position `lengths`
        self._propose(self._draft_blocks(self.max_length))
        self._commit_step(drafts, kept=none, verified=none)  # commits nothing unless the row ends with its first token

    def step(self) -> None:
        """Verify the candidates of all rows, commit the accepted ones and draft the next blocks."""
        candidates = torch.cat([self.bonus[:, None], self.drafts[:, : self.max_verified]], dim=1)  # [R, C]
        offsets = torch.arange(1 + self.max_verified, device=candidates.device)
        positions, kv_length = self.lengths[:, None] + offsets, self.max_length + len(offsets)
        parallel = self.draft is not None and len(self.rows) <= self.parallel_rows
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
        if self.draft is None:
            return None
        with self.timer("draft"):
            return self.passes.draft_blocks(self.lengths[:, None], kv_length, self.bonus[:, None])[:, 0]

    def _propose(self, block: Tensor | None) -> None:
        """Set the drafts [R, B-1] and how many of them to verify [R], given blocks [R, B, H] and the bonus tokens."""
        if block is None or self.draft is None:
            self.drafts, self.verified = self.bonus.new_empty(len(self.bonus), 0), torch.zeros_like(self.bonus)
            return
        with self.timer("calibrate"):
            bonus = self.bonus if self.calibrate else None
            self.drafts, confidence = drafts_and_confidence(
                self.draft.block_logits(contiguous_copy(block[:, 1:]), bonus)
            )
            room = self.max_new_tokens - 1 - self.generated  # drafts beyond max_new_tokens would be discarded
            self.verified = self.selection.count(confidence).minimum(room).clamp(min=0)

    def _commit_step(self, candidates: Tensor, kept: Tensor, verified: Tensor) -> None:
        """Commit the first `kept` [R] of each row's candidates [R, C] and remove finished rows.

        Copying the outcome to the host is the only device synchronization in a step, unless tokens are chosen one by
        one.
        """
        outcome = torch.stack([kept, verified, self.bonus, self.verified, self.lengths], dim=1)
        unfinished, max_verified, max_length = [], 0, 0
        for index, row in enumerate(torch.cat([outcome, candidates], dim=1).tolist()):
            count, scored, bonus, to_verify, length, *tokens = row
            if self._commit(self.rows[index], tokens[:count], scored, bonus):
                continue
            unfinished.append(index)
            max_verified, max_length = max(max_verified, to_verify), max(max_length, length)
        self.max_verified, self.max_length = max_verified, max_length
        if len(unfinished) < len(self.rows):
            self._keep(unfinished)

    def _commit(self, row: int, tokens: list[int], verified: int, bonus: int) -> bool:
        """Append the tokens committed in a step to the row's result. Return whether the row has finished."""
        answer = self.result.tokens[row]
        limit = self.states[row].limit if self.states else self.max_new_tokens
        end = next((i + 1 for i, token in enumerate(tokens) if token in self.stop), len(tokens))
        if tokens:
            answer += tokens[:end]
            self.result.steps[row].append(Step(verified, end - 1))  # drafts after the stop token do not count
        ended = bool(answer) and (answer[-1] in self.stop or len(answer) == limit)
        if not ended and (bonus in self.stop or len(answer) + 1 == limit):
            answer.append(bonus)  # the bonus token is final and ends the row: no verify step needed
            ended = True
        self.streams.show(row, answer if ended else [*answer, bonus], ended)
        return ended

    def _keep(self, unfinished: list[int]) -> None:
        """Keep only the rows at positions `unfinished` and drop the finished ones."""
        self.rows = [self.rows[index] for index in unfinished]
        if not unfinished:
            return
        indices = torch.tensor(unfinished, device=self.bonus.device)
        self.cache.keep(indices, self._slots(len(unfinished)))
        for name in ("lengths", "generated", "bonus", "drafts", "verified"):
            setattr(self, name, getattr(self, name)[indices])
        self.sampler.keep(indices)

    def _slots(self, rows: int) -> int:
        """Return the number of cache slots per row for `rows` rows in flight: B * B in parallel mode, otherwise B."""
        size = self.draft.block_size if self.draft else 0
        return size * size if rows <= self.parallel_rows else size


def _select_blocks(blocks: Tensor, number: Tensor) -> Tensor:
    """Select one block per row: [R, g, B, H] and indices [R] -> [R, B, H]."""
    return blocks[torch.arange(len(blocks), device=blocks.device), number]
