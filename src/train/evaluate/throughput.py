"""Decoding speed of a drafter on this device, compared with the target alone, and the recommended settings."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from models.acceptance import mean_acceptance_length
from models.cost.flops import DecodingFlops
from models.decoding.flex import PHASES, GenerationResult, generate
from models.decoding.selection import OFF, Selection
from models.draft import DraftModel
from train.evaluate.acceptance import Decoding

ALONE, DRAFTING = "target alone", ("sequential", "parallel")
CHANCE = 1.02  # minimum ratio for one rate to count as higher than the other; their spreads must also not overlap
ONE_REPEAT = 1.15  # minimum ratio for single measurements, which have no spread


@dataclass
class Speed:
    """Speed of one decoder at one batch size. Rates are medians over repeats."""

    decoder: str  # target alone | sequential | parallel
    rows: int
    threshold: float | None
    tau: float
    tokens_per_second: float
    spread: tuple[float, float]  # lowest and highest rate over the repeats
    step_ms: float  # per verify step, excluding prefill
    phase_ms: dict[str, float]  # per step: verify, draft, calibrate, overhead; from a separate run
    step_flops: float | None  # minimum FLOPs of one step; None if the architecture cannot be traced
    candidates: float  # mean tokens verified per step and row, bonus token included


@dataclass
class SpeedReport:
    """Speeds by batch size, threshold and benchmark, with the recommended settings."""

    device: str
    by_rows: list[Speed]
    by_threshold: list[Speed]
    recommended: dict[str, Any] = field(default_factory=dict)
    by_benchmark: dict[str, list[Speed]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-serializable dict."""
        return asdict(self)


class Stopwatch:
    """Accumulates seconds by phase, synchronizing the device at the start and end of each."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = now(self.device)
        yield
        self.seconds[name] += now(self.device) - started


def now(device: torch.device) -> float:
    """Return the current time in seconds after synchronizing the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass
class DecoderComparison:
    """Compares decoders on the same prompts in the same process."""

    target: PreTrainedModel
    draft: DraftModel
    calibrate: bool
    flops: DecodingFlops | None
    how: Decoding
    repeats: int

    def measure(self, decoder: str, prompts: list[list[int]], rows: int, selection: Selection) -> Speed:
        """Measure a decoder's speed on all prompts, decoded `rows` at a time.

        Runs a short warm-up, then one run timed by phase, then `repeats` runs timed as a whole.
        """
        groups = filled(prompts, rows)
        self._decode(decoder, groups[:1], replace(self.how, max_new_tokens=min(8, self.how.max_new_tokens)), selection)
        watch = Stopwatch(self.target.device)
        seconds, results = self._decode(decoder, groups, self.how, selection, timer=watch)
        times = [self._decode(decoder, groups, self.how, selection)[0] for _ in range(self.repeats)]
        tokens = sum(len(row) for result in results for row in result.tokens)
        # A batch takes as many steps as its longest row.
        steps = max(1, sum(max(map(len, result.steps)) for result in results))
        row_steps = [step for result in results for row in result.steps for step in row]
        candidates = sum(1 + step.verified for step in row_steps) / max(1, len(row_steps))
        phases = {name: 1e3 * watch.seconds[name] / steps for name in PHASES if name != "prefill"}
        phases["overhead"] = 1e3 * (seconds - sum(watch.seconds.values())) / steps
        without_prompts = 1 - watch.seconds["prefill"] / seconds
        return Speed(
            decoder=decoder,
            rows=rows,
            threshold=None if decoder == ALONE or selection.rule == "off" else selection.threshold,
            tau=mean_acceptance_length([step.accepted for step in row_steps]),
            tokens_per_second=tokens / median(times),
            spread=(tokens / max(times), tokens / min(times)),
            step_ms=1e3 * median(times) * without_prompts / steps,
            phase_ms=phases,
            step_flops=self._flops(decoder, len(row_steps) / steps, _mean_context(groups, tokens), candidates),
            candidates=candidates,
        )

    def _decode(
        self, decoder: str, groups: list[list[list[int]]], how: Decoding, selection: Selection, timer: Any = None
    ) -> tuple[float, list[GenerationResult]]:
        started = now(self.target.device)
        results = [
            generate(
                self.target,
                None if decoder == ALONE else self.draft,
                group,
                max_new_tokens=how.max_new_tokens,
                mode="auto" if decoder == ALONE else decoder,
                selection=selection,
                sampling=how.sampling,
                seed=how.seed,
                calibrate=self.calibrate,
                tokenizer=how.tokenizer,
                timer=timer,
            )
            for group in groups
        ]
        return now(self.target.device) - started, results

    def _flops(self, decoder: str, rows: float, context: float, candidates: float) -> float | None:
        """Return the FLOPs of one step with an average of `rows` active rows, or None if unknown."""
        if self.flops is None:
            return None
        blocks = {ALONE: 0.0, "sequential": 1.0, "parallel": candidates}[decoder]
        parts = self.flops.step(context=context, candidates=candidates, blocks=blocks)
        return rows * sum(parts.values())


def measure_speed(
    comparison: DecoderComparison,
    benchmarks: dict[str, list[list[int]]],
    batch_sizes: list[int],
    thresholds: list[float],
) -> SpeedReport:
    """Measure speed by batch size, threshold and benchmark.

    All batch sizes (always including 1) and thresholds (always including the configured one) are measured on the first
    benchmark. The best settings are then measured on every benchmark at batch size 1.
    """
    batch_sizes = sorted({1, *batch_sizes})
    first = next(iter(benchmarks.values()))
    chosen = comparison.how.selection
    tries = sorted({chosen.threshold, *thresholds}) if chosen.rule != "off" else []
    total = len(batch_sizes) * (1 + len(DRAFTING)) + len(tries) + len(benchmarks) * 2
    with tqdm(total=total, desc="speed", unit="decoder") as bar:

        def measured(decoder: str, prompts: list[list[int]], rows: int, selection: Selection) -> Speed:
            bar.set_postfix_str(f"{decoder}, batch size {rows}")
            speed = comparison.measure(decoder, prompts, rows, selection)
            bar.update()
            return speed

        by_rows = [measured(decoder, first, rows, chosen) for rows in batch_sizes for decoder in (ALONE, *DRAFTING)]
        mode = best_mode(by_rows, 1)
        by_threshold = [measured(mode, first, 1, Selection(chosen.rule, t) if t else OFF) for t in tries]
        recommended = recommendation(by_rows, by_threshold, chosen, comparison.target.device)
        recommended["calibrate"] = comparison.calibrate
        selection = Selection(recommended["selection"], recommended["threshold"])
        by_benchmark = {
            name: [measured(decoder, prompts, 1, selection) for decoder in (ALONE, mode)]
            for name, prompts in benchmarks.items()
        }
    return SpeedReport(recommended["device"], by_rows, by_threshold, recommended, by_benchmark)


def faster(one: Speed, other: Speed) -> bool:
    """Return whether `one` is faster than `other` by more than measurement noise."""
    margin = CHANCE if one.spread[0] < one.spread[1] else ONE_REPEAT
    return one.spread[0] > other.spread[1] and one.tokens_per_second > margin * other.tokens_per_second


def best_mode(by_rows: list[Speed], rows: int) -> str:
    """Return the faster mode at a batch size: sequential unless parallel is faster by more than measurement noise."""
    here = {speed.decoder: speed for speed in by_rows if speed.rows == rows}
    return "parallel" if faster(here["parallel"], here["sequential"]) else "sequential"


def recommendation(
    by_rows: list[Speed], by_threshold: list[Speed], chosen: Selection, device: torch.device
) -> dict[str, Any]:
    """Return the fastest settings for `generate` as plain values.

    `parallel_rows` is the largest batch size up to which parallel drafting always wins; `worth_it` lists the batch
    sizes at which drafting is faster than the target alone. Differences within measurement noise are ignored.
    """
    sizes = sorted({speed.rows for speed in by_rows})
    parallel_rows = 0
    for rows in sizes:
        if best_mode(by_rows, rows) != "parallel":
            break
        parallel_rows = rows
    configured = next((s for s in by_threshold if s.threshold == (chosen.threshold or None)), None)
    better = [s for s in by_threshold if configured and faster(s, configured)]
    best = max(better, key=lambda speed: speed.tokens_per_second, default=configured)
    rule, threshold = chosen.rule, chosen.threshold
    if best:
        rule, threshold = (chosen.rule, best.threshold) if best.threshold else ("off", 0.0)
    alone = {speed.rows: speed for speed in by_rows if speed.decoder == ALONE}
    gaining = {s.rows for s in by_rows if s.decoder != ALONE and faster(s, alone[s.rows])}
    return {
        "device": device_name(device),
        "parallel_rows": parallel_rows,
        "selection": rule,
        "threshold": threshold,
        "worth_it": sorted(gaining),
    }


def filled(prompts: list[list[int]], rows: int) -> list[list[list[int]]]:
    """Split the prompts into as few groups of `rows` as possible, filling the last with prompts from the start."""
    count = -(-len(prompts) // rows)
    return [[prompts[(rows * group + i) % len(prompts)] for i in range(rows)] for group in range(count)]


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or "CPU" with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def _mean_context(groups: list[list[list[int]]], new_tokens: int) -> float:
    """Return the mean number of tokens in a row's KV cache during decoding."""
    prompts = [len(prompt) for group in groups for prompt in group]
    return (sum(prompts) + new_tokens / 2) / len(prompts)
