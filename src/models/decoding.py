"""Flex Decoding: draft with the target's own last layers, verify in one pass, without changing what the target says."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.attention import NAME
from models.draft import DraftModel
from models.families import TESTED, text_positions
from models.metrics import accepted_drafts, mean_acceptance_length
from models.passes import Passes, difference_from_forward, prefill, separate
from models.sampling import GREEDY, Sampling
from models.selection import RELEASE, Selection, drafts_and_confidence

MODES = ("auto", "parallel", "sequential")
PARALLEL_ROWS = 2  # auto drafts in parallel up to so many rows in flight (FlexDraft, "Flex Decoding")
# Told the name of a phase, gives the context in which it runs: for measurements.
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


@torch.no_grad()
def generate(
    target: PreTrainedModel,
    draft: DraftModel | None,
    input_ids: Tensor | list[list[int]],
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    mode: str = "auto",
    selection: Selection = RELEASE,
    sampling: Sampling = GREEDY,
    seed: int | list[int] = 0,
    stop: set[int] | None = None,
    calibrate: bool = True,
    parallel_rows: int = PARALLEL_ROWS,
    timer: Timer | None = None,
) -> GenerationResult:
    """Decode a batch of prompts ("Flex Decoding").

    One step, for every row in flight: the candidates, which are the bonus token and the drafts after it, go through the
    target in one causal pass. Leading drafts that equal the token that the target itself chooses there are committed,
    and its choice after them is the next bonus token. Each row accepts its own number. So the output is the target's
    own, greedy or sampled: with the same seed it is the same tokens, however they were drafted, but for ties within
    rounding.

    * `sequential`: after the verification, one block goes through the draft layers; its slot 0 may hold the bonus.
    * `parallel`: the verifying pass carries a block for every number of drafts that may be accepted; one is read.
    * `auto`: parallel while at most `parallel_rows` rows are in flight.

    Args:
        draft: None lets the target decode alone, a token a pass: the baseline.
        input_ids: prompts as lists of token ids, or [R, T] padded on either side.
        attention_mask: [R, T] of a padded tensor, 0 for padding; None: no padding.
        selection: which drafts to verify.
        seed: of sampling. A row's numbers depend on its own seed alone; of one number, row i has seed + i.
        stop: tokens that end a row; None: the target's own.
        calibrate: False leaves out what corrects the drafter's logits.
        timer: called with each of PHASES around what it names.

    Raises:
        ValueError: no prompt, an empty one, an unknown token, more tokens than the target has positions, or an argument
            out of range.
    """
    prompts = _prompts(input_ids, attention_mask)
    _check(target, draft, prompts, max_new_tokens, mode)
    seeds = seed if isinstance(seed, list) else list(range(seed, seed + len(prompts)))
    if len(seeds) != len(prompts):
        raise ValueError(f"There are {len(seeds)} seeds for {len(prompts)} prompts.")
    result = GenerationResult([[] for _ in prompts], [[] for _ in prompts])
    if not max_new_tokens:
        return result
    flight = _Flight(
        target,
        draft,
        result,
        max_new_tokens=max_new_tokens,
        selection=selection,
        sampling=sampling,
        stop=stop_tokens(target) if stop is None else stop,
        calibrate=calibrate,
        parallel_rows={"parallel": len(prompts), "sequential": 0, "auto": parallel_rows}[mode],
        timer=timer or (lambda name: nullcontext()),
    )
    flight.start(prompts, seeds)
    while flight.rows:
        flight.step()
    return result


def uniform_numbers(seed: int, count: int) -> Tensor:
    """[count] one number for each new token of a row, so that a token does not depend on what was accepted before."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def stop_tokens(target: PreTrainedModel) -> set[int]:
    """Token ids at which the target ends its answer."""
    stop = target.generation_config.eos_token_id
    if stop is None:
        stop = target.config.eos_token_id
    return set() if stop is None else {stop} if isinstance(stop, int) else set(stop)


def check_untested(target: PreTrainedModel) -> None:
    """Decode a few tokens with an architecture that no test covers, in every way.

    Finds what no list of settings can: embeddings or logits that a model scales, layers that it runs another way,
    attention that the passes cannot run.

    Raises:
        ValueError: it cannot be decoded, or gives other logits or tokens than by its own forward.
    """
    kind, known = target.config.model_type, target.get_input_embeddings().num_embeddings
    if kind in TESTED:
        return
    prompt = [(7 * i + 1) % known for i in range(40)]
    try:
        difference = difference_from_forward(target, prompt)
        draft = DraftModel(target, num_layers=1, block_size=4, calibrator_rank=0)
        decoded = {m: generate(target, draft, [prompt], max_new_tokens=8, mode=m).tokens[0] for m in MODES[1:]}
    except Exception as error:
        raise ValueError(
            f"{kind} cannot be a target: its layers do not run in the passes of drafting "
            f"({type(error).__name__}: {error})."
        ) from error
    if difference:
        raise ValueError(
            f"{kind} cannot be a target: run layer by layer, its logits differ by {difference:.1%} of the greatest "
            "from its own, so its forward does more than its layers do."
        )
    ids = torch.tensor([prompt], device=target.device)
    mask = torch.ones_like(ids)
    own = target.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=8)[0, len(prompt) :].tolist()
    wrong = [mode for mode, tokens in decoded.items() if tokens != own]
    if wrong and target.dtype in (torch.float32, torch.float64):  # coarser ones may have ties
        raise ValueError(f"{kind} cannot be a target: {' and '.join(wrong)} decoding gives other tokens than its own.")


class _Flight:
    """The rows in flight. Tensors are indexed by place in `rows`, which shrinks as rows end; the cache with them."""

    def __init__(
        self,
        target: PreTrainedModel,
        draft: DraftModel | None,
        result: GenerationResult,
        *,
        max_new_tokens: int,
        selection: Selection,
        sampling: Sampling,
        stop: set[int],
        calibrate: bool,
        parallel_rows: int,
        timer: Timer,
    ) -> None:
        self.target, self.draft, self.result = target, draft, result
        self.max_new_tokens, self.selection, self.sampling, self.stop = max_new_tokens, selection, sampling, stop
        self.calibrate, self.parallel_rows, self.timer = calibrate, parallel_rows, timer

    def start(self, prompts: list[list[int]], seeds: list[int]) -> None:
        """Prompts, first bonus tokens, first drafts."""
        device = self.target.device
        size = self.draft.block_size if self.draft else 1
        self.rows = list(range(len(prompts)))  # of the result
        self.longest = max(map(len, prompts))  # tokens in the cache, in any row at most
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)  # [R] tokens in the cache
        self.said = torch.zeros_like(self.lengths)  # [R] new tokens before the bonus
        capacity = self.longest + self.max_new_tokens + size  # candidates reach beyond the last token that is kept
        self.uniforms = None
        if not self.sampling.greedy:
            rows = [uniform_numbers(seed, self.max_new_tokens) for seed in seeds]
            self.uniforms = torch.stack(rows).to(device)
        with self.timer("prefill"):
            logits, self.cache = prefill(self.target, prompts, capacity, self._slots(len(prompts)))
            self.passes = Passes(self.target, self.draft, self.cache)
            self.bonus = self._choose(logits[:, None], self.said[:, None])[:, 0]  # [R] at position `lengths`
        self._propose(self._drafted(self.longest))
        self._settle(self.bonus[:, None][:, :0], kept=self.said, verified=self.said)  # nothing yet, unless it ends here

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
            chosen = self._choose(logits, self.said[:, None] + 1 + offsets)  # [R, C] after each candidate
            del logits  # as large as those of the drafts, which come next
            accepted = accepted_drafts(candidates[:, 1:], chosen[:, :-1]).minimum(self.verified)  # [R]
            self.bonus = chosen.gather(1, accepted[:, None])[:, 0]
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
        end = next((i + 1 for i, token in enumerate(tokens) if token in self.stop), len(tokens))
        if tokens:
            answer += tokens[:end]
            self.result.steps[row].append(Step(verified, end - 1))  # what follows the stop token is no gain
            if answer[-1] in self.stop or len(answer) == self.max_new_tokens:
                return True
        if bonus in self.stop or len(answer) + 1 == self.max_new_tokens:
            answer.append(bonus)  # known already: nothing is left to verify
            return True
        return False

    def _keep(self, going: list[int]) -> None:
        """Forget the rows that have ended."""
        self.rows = [self.rows[place] for place in going]
        if not going:
            return
        places = torch.tensor(going, device=self.bonus.device)
        self.cache.keep(places, self._slots(len(going)))
        for name in ("lengths", "said", "bonus", "drafts", "verified"):
            setattr(self, name, getattr(self, name)[places])
        if self.uniforms is not None:
            self.uniforms = self.uniforms[places]

    def _slots(self, rows: int) -> int:
        """Slots of the cache that so many rows need: auto drafts in parallel only once few are left."""
        size = self.draft.block_size if self.draft else 0
        return size * size if rows <= self.parallel_rows else size

    def _choose(self, logits: Tensor, number: Tensor) -> Tensor:
        """[R, C] the target's choice of new tokens by number, [R, C], from its logits [R, C, V]."""
        if self.uniforms is None:
            return self.sampling.choose(logits, None)
        return self.sampling.choose(logits, self.uniforms.gather(1, number.clamp(max=self.max_new_tokens - 1)))


def _each(blocks: Tensor, number: Tensor) -> Tensor:
    """[R, B, H] of blocks [R, g, B, H] the one of a number, [R]."""
    return blocks[torch.arange(len(blocks), device=blocks.device), number]


def _prompts(input_ids: Tensor | list[list[int]], attention_mask: Tensor | None) -> list[list[int]]:
    """Prompts without padding.

    Raises:
        ValueError: not a list of prompts or [R, T], or a mask that does not fit or has holes.
    """
    if not isinstance(input_ids, Tensor):
        if attention_mask is not None:
            raise ValueError("attention_mask belongs to a padded tensor; prompts in lists have no padding.")
        if any(isinstance(prompt, int) for prompt in input_ids):
            raise ValueError("input_ids is one prompt; expected a list of prompts, such as [input_ids].")
        return [list(map(int, prompt)) for prompt in input_ids]
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; expected [rows, tokens].")
    if attention_mask is None:
        return input_ids.tolist()
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but input_ids {tuple(input_ids.shape)}."
        )
    mask = attention_mask.bool()
    if (mask.int().diff(dim=1).abs().sum(1) > 1).any():
        raise ValueError("attention_mask has padding within a prompt; expected it on one side only.")
    return [row[kept].tolist() for row, kept in zip(input_ids, mask, strict=True)]


def _check(
    target: PreTrainedModel, draft: DraftModel | None, prompts: list[list[int]], max_new_tokens: int, mode: str
) -> None:
    """
    Raises:
        ValueError: what cannot be decoded.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: expected one of {', '.join(MODES)}.")
    if draft is not None and draft.target is not target:
        raise ValueError("The drafter belongs to another target: it runs that one's layers.")
    if target.config._attn_implementation != NAME:
        raise ValueError(f"The target's attention is {target.config._attn_implementation!r}; load it with load_target.")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens}: expected 0 or more.")
    if not prompts:
        raise ValueError("There is no prompt; decoding needs at least one.")
    vocabulary = target.get_input_embeddings().num_embeddings
    limit = text_positions(target.config, draft.block_size if draft else 0)
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"The prompt of row {row} is empty; decoding needs at least one token to continue.")
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise ValueError(
                f"The prompt of row {row} has token {min(prompt) if min(prompt) < 0 else max(prompt)}; "
                f"expected 0 to {vocabulary - 1}."
            )
        if len(prompt) + max_new_tokens > limit:
            raise ValueError(
                f"The prompt of row {row} has {len(prompt)} tokens, which with max_new_tokens={max_new_tokens} makes "
                f"{len(prompt) + max_new_tokens}; the target has {limit} positions for them."
            )
