"""Flex Decoding: lossless speculative decoding that drafts with the target's last layers and verifies in one pass."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.errors import out_of_memory
from models.decoding.batch_decoder import (
    PHASES,
    BatchDecoder,
    GenerationResult,
    Row,
    Settings,
    Step,
    Streamer,
    Timer,
    no_timer,
)
from models.decoding.forward_passes import difference_from_forward
from models.decoding.generation_settings import (
    Criterion,
    Processor,
    check_generation_config,
    sequence_states,
    stop_tokens,
)
from models.decoding.requests import (
    check_length,
    check_models,
    check_types,
    functions_by_row,
    parse_integer,
    parse_prompts,
    parse_seeds,
    parse_stop_tokens,
    parse_streamers,
    parse_strings,
)
from models.decoding.sampling import GREEDY, Sampling
from models.decoding.selection import RELEASE, Selection
from models.draft import DraftModel
from models.draft_config import DraftConfig
from models.families import TESTED
from models.target import vocabulary

__all__ = ["MODES", "PHASES", "GenerationResult", "Step", "check_untested", "generate", "stop_tokens"]

MODES = ("auto", "parallel", "sequential")
PARALLEL_ROWS = 2  # row limit for parallel drafting in auto mode on a GPU (paper, "Flex Decoding")


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
    """Decode a batch of prompts (paper, "Flex Decoding").

    Each step runs the candidates of every row in flight (the bonus token and the drafts after it) through the target in
    one causal pass. It commits the leading drafts that equal the target's own choices; the target's choice after them
    becomes the next bonus token. Rows may accept different numbers of drafts. Decoding is lossless, whether greedy or
    sampled: with the same seed, every drafting mode yields the same tokens, except for ties within rounding. Greedy
    output equals that of `target.generate` in transformers, and sampled output has the same distribution. Both apply
    the logits processors and stopping criteria of the target's `generation_config`
    (models/decoding/generation_settings.py). `sampling` sets temperature, top-k and top-p.

    * `sequential`: after verification, one block runs through the draft layers; its slot 0 may hold the bonus token.
    * `parallel`: the verify pass also drafts a block for every possible number of accepted drafts; one is used.
    * `auto`: parallel while at most `parallel_rows` rows are in flight, otherwise sequential.

    Args:
        draft: the drafter; None: decode with the target alone, one token per pass (the baseline).
        input_ids: prompts as lists of token ids, or [R, T] padded on either side.
        attention_mask: [R, T] for padded prompts, 0 for padding; None: inferred from the target's padding token, as in
            transformers.
        selection: the rule that decides how many drafts to verify.
        seed: sampling seed, or a list with one per prompt. With a single seed, row i uses `seed + i`. A row's random
            numbers depend only on the row's seed.
        stop: ids of the stop tokens; None: those of the target.
        calibrate: False disables the calibrator and the chain.
        parallel_rows: row limit for `auto`; None: 2 on a GPU, 0 on a CPU.
        logits_processor, stopping_criteria: functions in addition to the target's own, with the signatures used by
            transformers: the ids [1, tokens] of one row, with the prompt but without padding, and scores [1, V] (None
            for a criterion). They are called once per new token in the row, in order. For several prompts, pass one
            list per prompt.
        stop_strings: strings that end a row; requires `tokenizer`.
        tokenizer: the target's tokenizer.
        streamer: receives the prompt of a row, then each token once it is final. For several prompts, pass one per
            prompt.
        timer: called with the name of a phase (see PHASES); returns a context manager to run the phase in.

    Raises:
        ValueError: before decoding starts, if there is no prompt, a prompt is empty, a token is unknown, a prompt and
            its new tokens are too long for the target, an argument is out of range or of the wrong type, or the target
            has unsupported generation settings.
    """
    check_models(target, draft)
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: expected one of {', '.join(MODES)}.")
    new_tokens = parse_integer("max_new_tokens", max_new_tokens)
    prompts = parse_prompts(target, input_ids, attention_mask)
    check_length(target, draft, prompts, new_tokens)
    rows, strings = len(prompts), parse_strings(stop_strings)
    seeds, streamers = parse_seeds(seed, rows), parse_streamers(streamer, rows)
    check_types(
        selection=selection, sampling=sampling, calibrate=calibrate, timer=timer, streamers=streamers,
        tokenizer=tokenizer, strings=strings,
    )  # fmt: skip
    stops = stop_tokens(target) if stop is None else parse_stop_tokens(target, stop)
    if parallel_rows is None:
        parallel_rows = rows_in_parallel(target.device)
    known = {"parallel": rows, "sequential": 0, "auto": parse_integer("parallel_rows", parallel_rows)}
    states = sequence_states(
        target,
        prompts,
        new_tokens,
        stops,
        processors=functions_by_row("logits_processor", logits_processor, rows),
        criteria=functions_by_row("stopping_criteria", stopping_criteria, rows),
        stop_strings=strings,
        tokenizer=tokenizer,
    )
    rows_in_order = [
        Row(prompt, seeds[i], states[i] if states else None, streamers[i]) for i, prompt in enumerate(prompts)
    ]
    if not new_tokens:
        for row in rows_in_order:
            row.stream([], ended=True)
        return GenerationResult([[] for _ in prompts], [[] for _ in prompts])
    settings = Settings(
        target,
        draft,
        max_new_tokens=new_tokens,
        sampling=sampling,
        selection=selection,
        stop=stops,
        calibrate=calibrate,
        parallel_rows=known[mode],
        timer=timer or no_timer,
    )
    decoder = BatchDecoder(settings, rows_in_order)
    while decoder.rows:
        decoder.step()
    return GenerationResult([row.tokens for row in rows_in_order], [row.steps for row in rows_in_order])


def rows_in_parallel(device: torch.device) -> int:
    """Return the default row limit for `auto`, used if no evaluation has measured the modes.

    On a GPU, a small batch is bound by weight reads, so redundant blocks are nearly free. A CPU is compute-bound.
    """
    return 0 if device.type == "cpu" else PARALLEL_ROWS


def check_untested(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Check the target by decoding a few tokens in every mode, if no test covers its architecture.

    Detects differences that the config does not reveal: scaled embeddings or logits, layers that are called
    differently, and attention that the decoding passes cannot run.

    Args:
        tokenizer: the target's tokenizer; required if its `generation_config` has stop strings.

    Raises:
        ValueError: the target cannot be decoded, its logits or tokens differ from its own forward's, or its generation
            settings are unsupported.
    """
    check_generation_config(target, tokenizer)
    kind, known = target.config.model_type, vocabulary(target)
    if kind in TESTED:
        return
    prompt = [(7 * i + 1) % known for i in range(40)]
    try:
        difference = difference_from_forward(target, prompt)
        draft = DraftModel(target, DraftConfig(num_layers=1, block_size=4, calibrator_rank=0))
        how: dict[str, Any] = {"max_new_tokens": 8, "tokenizer": tokenizer}
        decoded = {m: generate(target, draft, [prompt], mode=m, **how).tokens[0] for m in MODES[1:]}
    except Exception as error:
        if out_of_memory(error):  # not the target's fault
            raise
        raise ValueError(
            f"{kind} is not supported as a target: drafting with its layers failed ({type(error).__name__}: {error})."
        ) from error
    if difference:
        raise ValueError(
            f"{kind} is not supported as a target: when run layer by layer, its logits differ by {difference:.1%} of "
            "the largest logit, so its forward does more than run its layers."
        )
    ids = torch.tensor([prompt], device=target.device)
    mask = torch.ones_like(ids)
    how |= {"attention_mask": mask, "do_sample": False, "return_dict_in_generate": False}
    own = cast(Any, target).generate(ids, **how)[0, len(prompt) :].tolist()
    wrong = [mode for mode, tokens in decoded.items() if tokens != own]
    if wrong and target.dtype in (torch.float32, torch.float64):  # lower precision may produce ties
        raise ValueError(
            f"{kind} is not supported as a target: {' and '.join(wrong)} decoding differs from its own output."
        )
