"""The rows of a batch on their way through decoding: drafting, verifying and committing, step by step."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.acceptance import mean_acceptance_length
from models.decoding.forward_passes import Passes, prefill, separate
from models.decoding.generation_settings import Text
from models.decoding.selection import Selection, drafts_and_confidence
from models.decoding.target_choice import Choice
from models.draft import DraftModel

# Given the name of a phase, returns the context in which it runs: for measurements.
Timer = Callable[[str], AbstractContextManager]
PHASES = ("prefill", "verify", "draft", "calibrate")


@dataclass(frozen=True)
class Step:
    """What one verify step did for one row."""

    verified: int  # drafts that the target scored
    accepted: int  # leading ones of them that it agreed with, and that were kept


@dataclass
class GenerationResult:
    """What decoding gave, by row."""

    tokens: list[list[int]]  # new tokens, the stop token included
    steps: list[list[Step]]

    def accepted(self) -> list[int]:
        """Accepted drafts of all verify steps of all rows."""
        return [step.accepted for row in self.steps for step in row]

    @property
    def tau(self) -> float:
        """Mean acceptance length over all verify steps of all rows."""
        return mean_acceptance_length(self.accepted())


class Streamer(Protocol):
    """As `BaseStreamer` of transformers."""

    def put(self, value: Tensor) -> None:
        """[1, tokens] a prompt, or [1] a new token; on the CPU."""

    def end(self) -> None:
        """There is no further token."""


class Streams:
    """Hands the tokens of rows to their streamers as soon as they are certain."""

    def __init__(self, streamers: list[Streamer | None], prompts: list[list[int]]) -> None:
        self._streamers, self._shown = streamers, [0] * len(prompts)
        for streamer, prompt in zip(streamers, prompts, strict=True):
            if streamer is not None:
                streamer.put(torch.tensor([prompt]))

    def show(self, row: int, tokens: list[int], ended: bool) -> None:
        """All new tokens of a row so far, of which some may have been shown before."""
        streamer = self._streamers[row]
        if streamer is None:
            return
        for token in tokens[self._shown[row] :]:
            streamer.put(torch.tensor([token]))
        self._shown[row] = len(tokens)
        if ended:
            streamer.end()

    def end(self) -> None:
        """All rows have ended."""
        for streamer in filter(None, self._streamers):
            streamer.end()


class Flight:
    """The rows in flight. Tensors are indexed by place in `rows`, which shrinks as rows end; the cache with them."""

    def __init__(
        self,
        target: PreTrainedModel,
        draft: DraftModel | None,
        result: GenerationResult,
        *,
        max_new_tokens: int,
        choice: Choice,
        texts: list[Text] | None,
        selection: Selection,
        stop: set[int],
        calibrate: bool,
        parallel_rows: int,
        streams: Streams,
        timer: Timer,
    ) -> None:
        """
        Args:
            choice: of the target's tokens.
            texts: of all rows, if the choice goes by them.
            parallel_rows: drafting is parallel while at most so many rows are in flight.
        """
        self.target, self.draft, self.result = target, draft, result
        self.max_new_tokens, self.choice, self.texts = max_new_tokens, choice, texts
        self.selection, self.stop, self.calibrate, self.parallel_rows = selection, stop, calibrate, parallel_rows
        self.streams, self.timer = streams, timer

    def start(self, prompts: list[list[int]]) -> None:
        """Prompts, first bonus tokens, first drafts."""
        device = self.target.device
        size = self.draft.block_size if self.draft else 1
        self.rows = list(range(len(prompts)))  # of the result
        self.longest = max(map(len, prompts))  # tokens in the cache, in any row at most
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)  # [R] tokens in the cache
        self.said = torch.zeros_like(self.lengths)  # [R] new tokens before the bonus
        capacity = self.longest + self.max_new_tokens + size  # candidates reach beyond the last token that is kept
        with self.timer("prefill"):
            logits, self.cache = prefill(self.target, prompts, capacity, self._slots(len(prompts)))
            self.passes = Passes(self.target, self.draft, self.cache)
            none = self.said  # as long as nothing is drafted
            drafts = torch.empty(len(prompts), 0, dtype=torch.long, device=device)
            self.bonus = self.choice.after(drafts, none, logits[:, None], none)[1]  # [R] at position `lengths`
        self._propose(self._drafted(self.longest))
        self._settle(drafts, kept=none, verified=none)  # nothing yet, unless it ends here

    def step(self) -> None:
        """Verify the candidates of all rows, and draft the next."""
        candidates = torch.cat([self.bonus[:, None], self.drafts[:, : self.most]], dim=1)  # [R, C]
        offsets = torch.arange(1 + self.most, device=candidates.device)
        positions, reach = self.lengths[:, None] + offsets, self.longest + len(offsets)
        parallel = self.draft is not None and len(self.rows) <= self.parallel_rows
        with self.timer("verify"):
            if parallel:
                logits, blocks = self.passes.verify_and_draft(candidates, positions, reach)
            else:
                logits = self.passes.verify(candidates, positions, reach)
            accepted, self.bonus = self.choice.after(candidates[:, 1:], self.verified, logits, self.said + 1)
            del logits  # as large as those of the drafts, which come next
            self.lengths = self.lengths + accepted + 1
            self.said = self.said + accepted + 1
        verified = self.verified
        self._propose(_each(blocks, accepted) if parallel else self._drafted(reach))
        self._settle(candidates, accepted + 1, verified)

    def _drafted(self, reach: int) -> Tensor | None:
        """[R, B, H] blocks at the bonus tokens, by a pass of their own."""
        if self.draft is None:
            return None
        with self.timer("draft"):
            return self.passes.draft_blocks(self.lengths[:, None], reach, self.bonus[:, None])[:, 0]

    def _propose(self, block: Tensor | None) -> None:
        """Drafts [R, B-1] out of blocks [R, B, H] and bonus tokens, and how many of them to verify, [R]."""
        if block is None:
            self.drafts, self.verified = self.bonus.new_empty(len(self.bonus), 0), torch.zeros_like(self.bonus)
            return
        with self.timer("calibrate"):
            bonus = self.bonus if self.calibrate else None
            self.drafts, confidence = drafts_and_confidence(self.draft.block_logits(separate(block[:, 1:]), bonus))
            room = self.max_new_tokens - 1 - self.said  # no draft is worth verifying beyond the last token to be kept
            self.verified = self.selection.count(confidence).minimum(room).clamp(min=0)

    def _settle(self, candidates: Tensor, kept: Tensor, verified: Tensor) -> None:
        """Commit the first `kept` [R] of candidates [R, C], and let go the rows that have ended.

        Reads the step's outcome on the host: the only time in a step that the host waits for the device.
        """
        outcome = torch.stack([kept, verified, self.bonus, self.verified, self.lengths], dim=1)
        going, most, longest = [], 0, 0
        for place, row in enumerate(torch.cat([outcome, candidates], dim=1).tolist()):
            count, scored, bonus, to_verify, length, *tokens = row
            if self._commit(self.rows[place], tokens[:count], scored, bonus):
                continue
            going.append(place)
            most, longest = max(most, to_verify), max(longest, length)
        self.most, self.longest = most, longest
        if len(going) < len(self.rows):
            self._keep(going)

    def _commit(self, row: int, tokens: list[int], verified: int, bonus: int) -> bool:
        """Write down what a step gave to a row of the result; returns whether it has ended."""
        answer = self.result.tokens[row]
        limit = self.texts[row].limit if self.texts else self.max_new_tokens
        end = next((i + 1 for i, token in enumerate(tokens) if token in self.stop), len(tokens))
        if tokens:
            answer += tokens[:end]
            self.result.steps[row].append(Step(verified, end - 1))  # what follows the stop token is no gain
        ended = bool(answer) and (answer[-1] in self.stop or len(answer) == limit)
        if not ended and (bonus in self.stop or len(answer) + 1 == limit):
            answer.append(bonus)  # known already: nothing is left to verify
            ended = True
        self.streams.show(row, answer if ended else [*answer, bonus], ended)
        return ended

    def _keep(self, going: list[int]) -> None:
        """Forget the rows that have ended."""
        self.rows = [self.rows[place] for place in going]
        if not going:
            return
        places = torch.tensor(going, device=self.bonus.device)
        self.cache.keep(places, self._slots(len(going)))
        for name in ("lengths", "said", "bonus", "drafts", "verified"):
            setattr(self, name, getattr(self, name)[places])
        self.choice.keep(places)

    def _slots(self, rows: int) -> int:
        """Slots of the cache that so many rows need: auto drafts in parallel only once few are left."""
        size = self.draft.block_size if self.draft else 0
        return size * size if rows <= self.parallel_rows else size


def _each(blocks: Tensor, number: Tensor) -> Tensor:
    """[R, B, H] of blocks [R, g, B, H] the one of a number, [R]."""
    return blocks[torch.arange(len(blocks), device=blocks.device), number]
