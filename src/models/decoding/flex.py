"""Flex Decoding: draft with the target's own last layers, verify in one pass, without changing the target's output."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.errors import out_of_memory
from models.decoding.batch_decoder import PHASES, Flight, GenerationResult, Step, Streamer, Streams, Timer
from models.decoding.forward_passes import difference_from_forward
from models.decoding.generation_settings import Criterion, Processor, check_followed, stop_tokens, texts
from models.decoding.requests import (
    by_row,
    check_length,
    check_models,
    check_types,
    integer,
    prompts_of,
    seeds_of,
    stop_set,
    streamers_of,
    strings_of,
)
from models.decoding.sampling import GREEDY, Sampling
from models.decoding.selection import RELEASE, Selection
from models.decoding.target_choice import Choice, ChoiceByText
from models.draft import DraftModel
from models.families import TESTED
from models.target import vocabulary

__all__ = ["MODES", "PHASES", "GenerationResult", "Step", "check_untested", "generate", "stop_tokens"]

MODES = ("auto", "parallel", "sequential")
PARALLEL_ROWS = 2  # auto drafts in parallel up to so many rows in flight, on a GPU (FlexDraft, "Flex Decoding")


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
    parallel_rows: int | None = None,
    logits_processor: Sequence[Processor] | Sequence[Sequence[Processor]] | None = None,
    stopping_criteria: Sequence[Criterion] | Sequence[Sequence[Criterion]] | None = None,
    stop_strings: str | list[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    streamer: Streamer | list[Streamer | None] | None = None,
    timer: Timer | None = None,
) -> GenerationResult:
    """Decode a batch of prompts ("Flex Decoding").

    One step, for every row in flight: the candidates, which are the bonus token and the drafts after it, go through the
    target in one causal pass. Leading drafts that equal the token that the target itself chooses there are committed,
    and its choice after them is the next bonus token. Each row accepts its own number. So the output is the target's
    own, greedy or sampled: with the same seed it is the same tokens, however they were drafted, but for ties within
    rounding. That is what `target.generate` of transformers writes, with the logits processors and stopping criteria of
    the target's `generation_config` (models/decoding/generation_settings.py); how tokens are sampled is given by
    `sampling`.

    * `sequential`: after the verification, one block goes through the draft layers; its slot 0 may hold the bonus.
    * `parallel`: the verifying pass carries a block for every number of drafts that may be accepted; one is read.
    * `auto`: parallel while at most `parallel_rows` rows are in flight.

    Args:
        draft: None lets the target decode alone, a token a pass: the baseline.
        input_ids: prompts as lists of token ids, or [R, T] padded on either side.
        attention_mask: [R, T] of a padded tensor, 0 for padding; None: as transformers infers it from the target's
            padding token.
        selection: which drafts to verify.
        seed: of sampling. A row's numbers depend on its own seed alone; of one number, row i has seed + i.
        stop: tokens that end a row; None: the target's own.
        calibrate: False leaves out what corrects the drafter's logits.
        parallel_rows: of `auto`; None: 2 on a GPU, 0 on a CPU.
        logits_processor, stopping_criteria: beside the target's own, with the signatures that transformers gives them:
            called with ids [1, tokens] of one row, prompt included, without padding, and scores [1, V], or None for a
            criterion; once for each new token of the row, in order. For several prompts, a list of them for each.
        stop_strings: texts that end a row, with the `tokenizer` of the target.
        streamer: gets a row's prompt, then each of its tokens once it is certain. For several prompts, one for each.
        timer: called with each of PHASES around what it names.

    Raises:
        ValueError: before anything runs: no prompt, an empty one, an unknown token, more tokens than the target has
            positions, an argument out of range or of another type, or generation settings of the target that cannot be
            followed.
    """
    check_models(target, draft)
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: expected one of {', '.join(MODES)}.")
    new_tokens = integer("max_new_tokens", max_new_tokens)
    prompts = prompts_of(target, input_ids, attention_mask)
    check_length(target, draft, prompts, new_tokens)
    rows, strings = len(prompts), strings_of(stop_strings)
    seeds, streamers = seeds_of(seed, rows), streamers_of(streamer, rows)
    check_types(
        selection=selection, sampling=sampling, calibrate=calibrate, timer=timer, streamers=streamers,
        tokenizer=tokenizer, strings=strings,
    )  # fmt: skip
    stops = stop_tokens(target) if stop is None else stop_set(target, stop)
    if parallel_rows is None:
        parallel_rows = rows_in_parallel(target.device)
    known = {"parallel": rows, "sequential": 0, "auto": integer("parallel_rows", parallel_rows)}
    own = texts(
        target,
        prompts,
        new_tokens,
        stops,
        processors=by_row("logits_processor", logits_processor, rows),
        criteria=by_row("stopping_criteria", stopping_criteria, rows),
        stop_strings=strings,
        tokenizer=tokenizer,
    )
    result = GenerationResult([[] for _ in prompts], [[] for _ in prompts])
    streams = Streams(streamers, prompts)
    if not new_tokens:
        streams.end()
        return result
    plain = (sampling, seeds, new_tokens, target.device)
    flight = Flight(
        target,
        draft,
        result,
        max_new_tokens=new_tokens,
        choice=ChoiceByText(*plain, own, stops) if own else Choice(*plain),
        texts=own,
        selection=selection,
        stop=stops,
        calibrate=calibrate,
        parallel_rows=known[mode],
        streams=streams,
        timer=timer or (lambda name: nullcontext()),
    )
    flight.start(prompts)
    while flight.rows:
        flight.step()
    return result


def rows_in_parallel(device: torch.device) -> int:
    """Up to how many rows in flight `auto` drafts in parallel, as long as nothing was measured on the device: redundant
    blocks are nearly free where reading the weights takes the time, and on a CPU arithmetic does."""
    return 0 if device.type == "cpu" else PARALLEL_ROWS


def check_untested(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Decode a few tokens with an architecture that no test covers, in every way.

    Finds what no list of settings can: embeddings or logits that a model scales, layers that it runs another way,
    attention that the passes cannot run.

    Args:
        tokenizer: of the target; its stop strings need it.

    Raises:
        ValueError: it cannot be decoded, gives other logits or tokens than by its own forward, or has generation
            settings that cannot be followed.
    """
    check_followed(target, tokenizer)
    kind, known = target.config.model_type, vocabulary(target)
    if kind in TESTED:
        return
    prompt = [(7 * i + 1) % known for i in range(40)]
    try:
        difference = difference_from_forward(target, prompt)
        draft = DraftModel(target, num_layers=1, block_size=4, calibrator_rank=0)
        how = {"max_new_tokens": 8, "tokenizer": tokenizer}
        decoded = {m: generate(target, draft, [prompt], mode=m, **how).tokens[0] for m in MODES[1:]}
    except Exception as error:
        if out_of_memory(error):  # nothing is wrong with the target
            raise
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
    how |= {"attention_mask": mask, "do_sample": False, "return_dict_in_generate": False}
    own = target.generate(ids, **how)[0, len(prompt) :].tolist()
    wrong = [mode for mode, tokens in decoded.items() if tokens != own]
    if wrong and target.dtype in (torch.float32, torch.float64):  # coarser ones may have ties
        raise ValueError(f"{kind} cannot be a target: {' and '.join(wrong)} decoding gives other tokens than its own.")
