"""Evaluation report: tables for the terminal and Markdown, and plots."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from data.terminal import terminal
from models.decoding.selection import Selection
from train.evaluate.acceptance import BenchmarkReport, Decoding, VariantReport, histogram
from train.evaluate.groups import ANSWER, KIND, PROMPT, Tau
from train.evaluate.plots import finish, plt
from train.evaluate.throughput import ALONE, SpeedReport
from train.terminal import say

COLORS = {
    "untuned": "#9aa5b1",
    "attention_tuned": "#2878b5",
    "calibrated_parallel": "#e39a2d",
    "calibrated": "#c8443c",
}
TIE = 1e-4  # logit margin below which float32 rounding may swap two tokens
BY_KIND = "τ by kind of answer, with 95% interval"
BY_LENGTH = "τ by length, with 95% interval"
STEPS = "Time per verify step in ms, with FLOPs and FLOP/s"
DECODER_COLORS = {ALONE: "#9aa5b1", "sequential": "#2878b5", "parallel": "#c8443c"}


@dataclass
class Evaluation:
    """All results of an evaluation."""

    how: Decoding
    dtype: str
    target: str
    benchmarks: dict[str, BenchmarkReport]  # plus the pooled report `all`, if there are several
    speed: SpeedReport | None
    wrong: list[str]  # differences found by `check_baseline`
    generation_settings: dict[str, Any] = field(default_factory=dict)  # the target's settings that affect its output

    @property
    def together(self) -> BenchmarkReport:
        """The report on all prompts of all benchmarks."""
        return next(reversed(self.benchmarks.values()))

    def broken(self) -> str | None:
        """Return a description of the first correctness failure, or None.

        A failure is a difference between our forward passes of the target and those of transformers or, for greedy
        decoding in float32 or float64, a drafter's output that differs from the target's at a position without a tie.
        """
        if self.wrong:
            return f"{self.wrong[0]}."
        if self.dtype not in ("float32", "float64") or not self.how.sampling.greedy:
            return None
        for benchmark, report in self.benchmarks.items():
            for name, variant in report.variants.items():
                for d in variant.differences:
                    if d.margin > TIE:
                        return f"{benchmark}: {name}: prompt {d.prompt}, token {d.token}, margin {d.margin:.2g}."
        return None

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-serializable dict."""
        return {
            "target": self.target,
            "dtype": self.dtype,
            "how": {
                "max_new_tokens": self.how.max_new_tokens,
                "sampling": vars(self.how.sampling),
                "selection": vars(self.how.selection),
            },
            "generation_settings": self.generation_settings,
            "wrong": self.wrong,
            "benchmarks": {name: report.as_dict() for name, report in self.benchmarks.items()},
            "speed": self.speed.as_dict() if self.speed else None,
        }

    def summary(self) -> dict[str, Any]:
        """Return the main metrics for comparing runs."""
        keys = ("tau", "low", "high", "verify_steps", "identical")
        found = {
            name: {variant: {key: getattr(one, key) for key in keys} for variant, one in report.variants.items()}
            for name, report in self.benchmarks.items()
        }
        kinds = {kind: asdict(group) for kind, group in self.together.groups()[KIND].items()}
        return {"benchmarks": found, "by_kind": kinds, "recommended": self.speed.recommended if self.speed else {}}


Rows = list[list[str]]  # the first row is the header


def tables(evaluation: Evaluation) -> dict[str, Rows]:
    """Return all result tables, keyed by title."""
    how, sampling = evaluation.how, evaluation.how.sampling
    settings = "greedy" if sampling.greedy else f"temperature {sampling.temperature}, top_p {sampling.top_p}"
    if sampling.top_k and not sampling.greedy:
        settings += f", top_k {sampling.top_k}"
    title = f"Acceptance: {settings}, {evaluation.dtype}, up to {how.max_new_tokens} new tokens"
    found = {title: _acceptance(evaluation.benchmarks)}
    found[BY_KIND] = _by_group(evaluation.benchmarks, [KIND])
    found[BY_LENGTH] = _by_group({"": evaluation.together}, [PROMPT, ANSWER])
    if speed := evaluation.speed:
        first = next(iter(evaluation.benchmarks))
        found[f"Tokens/s by benchmark, one prompt at a time, {speed.device}"] = _by_benchmark(speed)
        found[f"Tokens/s by batch size, including prefill; {first}"] = _by_rows(speed)
        found[STEPS] = _steps(speed)
        if speed.by_threshold:
            rule = how.selection.rule
            found[f"Selective verification ({rule}), batch size 1; {first}"] = _by_threshold(speed)
    return found


def markdown(evaluation: Evaluation, name: str) -> str:
    """Format the report as a Markdown document."""
    selection = _selection(evaluation.how.selection)
    lines = [f"# Evaluation of {name}", "", f"Target: {evaluation.target}. Selective verification: {selection}."]
    for title, rows in tables(evaluation).items():
        lines += ["", f"## {title}", "", _line(rows[0]), _line(["---"] * len(rows[0])), *map(_line, rows[1:])]
    lines += ["", *_remarks(evaluation)]
    lines += ["", "![acceptance by slot](../acceptance_by_slot.png)"]
    if evaluation.speed:
        lines += ["![speed](speed.png)"]
    return "\n".join(lines) + "\n"


def print_report(evaluation: Evaluation, run_dir: Path) -> None:
    """Print tables and remarks to the terminal.

    The breakdown of step time, τ by length and τ of a single kind appear only in the Markdown report.
    """
    console = terminal()
    several = len(evaluation.together.groups()[KIND]) > 1
    for title, (header, *rows) in tables(evaluation).items():
        if title in (STEPS, BY_LENGTH) or (title == BY_KIND and not several):
            continue
        table = Table(title=title, title_justify="left", min_width=60)
        for column, text in enumerate(header):
            table.add_column(text, justify="left" if column == 0 or text == "drafter" else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for remark in _remarks(evaluation):
        say(remark)
    say(f"drafter: {run_dir / 'export'}   report and plots: {run_dir / 'evaluate'}")


def plot_acceptance(evaluation: Evaluation, path: Path) -> None:
    """Plot each variant's acceptance rate by slot and its distribution of acceptance lengths."""
    figure, (by_slot, lengths) = plt.subplots(1, 2, figsize=(12, 4))
    together = evaluation.together
    width = 0.8 / len(together.variants)
    for number, (name, variant) in enumerate(together.variants.items()):
        label = f"{name.replace('_', ' ')}, τ = {variant.tau:.2f}"
        slots = range(1, len(variant.acceptance_by_slot) + 1)
        by_slot.plot(slots, variant.acceptance_by_slot, marker="o", label=label, color=COLORS.get(name))
        counts = histogram(variant.accepted)
        places = [length + (number - (len(together.variants) - 1) / 2) * width for length in counts]
        fractions = [count / variant.verify_steps for count in counts.values()]
        lengths.bar(places, fractions, width, label=label, color=COLORS.get(name))
    by_slot.set(xlabel="slot in the block", ylabel="fraction of verify steps that accepted it", ylim=(0, 1))
    by_slot.set_title(f"Acceptance by slot, {together.prompts} prompts")
    lengths.set(xlabel="acceptance length, including the bonus token", ylabel="fraction of verify steps")
    lengths.set_title("Acceptance lengths")
    finish(figure, by_slot)
    finish(figure, lengths, path)


def plot_speed(speed: SpeedReport, path: Path) -> None:
    """Plot tokens/s against batch size, and the breakdown of step time by phase."""
    figure, (rates, phases) = plt.subplots(1, 2, figsize=(12, 4))
    for decoder, color in DECODER_COLORS.items():
        points = [s for s in speed.by_rows if s.decoder == decoder]
        rows, middle = [s.rows for s in points], [s.tokens_per_second for s in points]
        rates.plot(rows, middle, marker="o", label=decoder, color=color)
        rates.fill_between(rows, [s.spread[0] for s in points], [s.spread[1] for s in points], color=color, alpha=0.15)
    rates.set(xlabel="batch size", ylabel="tokens/s", title=f"Speed, {speed.device}", xscale="log")
    rates.set_xticks([s.rows for s in speed.by_rows], [str(s.rows) for s in speed.by_rows])
    labels = [f"{s.decoder}\n{s.rows}" for s in speed.by_rows]
    bottom = [0.0] * len(labels)
    for phase in ("verify", "draft", "calibrate", "overhead"):
        heights = [s.phase_ms[phase] for s in speed.by_rows]
        phases.bar(labels, heights, bottom=bottom, label=phase)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    phases.set(ylabel="ms per verify step", title="Time per verify step, by decoder and batch size")
    phases.tick_params(axis="x", labelsize=6, rotation=60)
    finish(figure, rates)
    finish(figure, phases, path)


def _acceptance(benchmarks: dict[str, BenchmarkReport]) -> Rows:
    rows = [["benchmark", "drafter", "τ", "95%", "steps", "drafts", "identical"]]
    for name, report in benchmarks.items():
        rows += [[name, variant, *_variant(found, report.prompts)] for variant, found in report.variants.items()]
    return rows


def _by_group(benchmarks: dict[str, BenchmarkReport], groupings: list[str]) -> Rows:
    variants = list(next(iter(benchmarks.values())).variants)
    rows = [["benchmark" if KIND in groupings else "", "kind" if KIND in groupings else "tokens", "prompts", *variants]]
    for benchmark, report in benchmarks.items():
        for grouping in groupings:
            for label, group in report.groups()[grouping].items():
                taus = [_tau(tau) for tau in group.variants.values()]
                rows.append([benchmark or grouping.removesuffix(" tokens"), label, str(group.prompts), *taus])
    return rows


def _tau(found: Tau) -> str:
    return f"{found.tau:.2f} ({_interval(found)})" if found.verify_steps else "-"


def _interval(found: VariantReport | Tau) -> str:
    return "-" if math.isnan(found.low) else f"{found.low:.2f}-{found.high:.2f}"


def _variant(found: VariantReport, prompts: int) -> list[str]:
    return [f"{found.tau:.2f}", _interval(found), f"{found.verify_steps:,}", f"{found.verified:.1f}"] + [
        f"{found.identical}/{prompts}"
    ]


def _by_benchmark(speed: SpeedReport) -> Rows:
    rows = [["benchmark", ALONE, "drafted", "speed-up", "mode", "τ"]]
    for name, (alone, drafted) in speed.by_benchmark.items():
        times = f"{drafted.tokens_per_second / alone.tokens_per_second:.2f}x"
        rates = [f"{s.tokens_per_second:,.0f}" for s in (alone, drafted)]
        rows.append([name, *rates, times, drafted.decoder, f"{drafted.tau:.2f}"])
    return rows


def _by_rows(speed: SpeedReport) -> Rows:
    rows = [["batch size", ALONE, "sequential", "parallel"]]
    alone = {s.rows: s.tokens_per_second for s in speed.by_rows if s.decoder == ALONE}
    for size, base in alone.items():
        here = {s.decoder: s.tokens_per_second for s in speed.by_rows if s.rows == size}
        drafted = [f"{here[mode]:,.0f} ({here[mode] / base:.2f}x)" for mode in ("sequential", "parallel")]
        rows.append([str(size), f"{base:,.0f}", *drafted])
    return rows


def _steps(speed: SpeedReport) -> Rows:
    rows = [["decoder", "batch size", "step", "verify", "draft", "calibrate", "overhead", "GFLOP", "GFLOP/s"]]
    for s in speed.by_rows:
        phases = [f"{s.phase_ms[phase]:.2f}" for phase in ("verify", "draft", "calibrate", "overhead")]
        work = ["", ""]
        if s.step_flops:
            work = [f"{s.step_flops / 1e9:,.3g}", f"{s.step_flops / 1e6 / s.step_ms:,.0f}"]
        rows.append([s.decoder, str(s.rows), f"{s.step_ms:.2f}", *phases, *work])
    return rows


def _by_threshold(speed: SpeedReport) -> Rows:
    rows = [["threshold", "drafts", "τ", "tokens/s"]]
    for s in speed.by_threshold:
        threshold = "off" if s.threshold is None else f"{s.threshold:g}"
        rows.append([threshold, f"{s.candidates - 1:.1f}", f"{s.tau:.2f}", f"{s.tokens_per_second:,.0f}"])
    return rows


def _remarks(evaluation: Evaluation) -> list[str]:
    together = evaluation.together
    identical = min(variant.identical for variant in together.variants.values())
    remarks = [f"lossless: {identical}/{together.prompts} prompts identical"]
    if evaluation.generation_settings:
        followed = ", ".join(f"{name}={value}" for name, value in evaluation.generation_settings.items())
        remarks.append(f"settings from the target's generation_config, applied with and without a drafter: {followed}")
    margins = [d.margin for variant in together.variants.values() for d in variant.differences]
    if margins:
        remarks.append(
            f"largest margin between the target's top two scores at the first differing token: {max(margins):.2g}"
        )
    if together.left_out:
        remarks.append(f"skipped: {together.left_out} turns whose answers could exceed the target's context length")
    if evaluation.speed:
        best = evaluation.speed.recommended
        chosen = _selection(Selection(best["selection"], best["threshold"]))
        modes = f"parallel up to batch size {best['parallel_rows']}" if best["parallel_rows"] else "always sequential"
        worth = ", ".join(map(str, best["worth_it"])) or "none"
        remarks.append(f"recommended on {best['device']}: {modes}, selection {chosen}")
        remarks.append(f"batch sizes with a speed-up over the target alone: {worth}")
    return remarks


def _selection(selection: Selection) -> str:
    return selection.rule if selection.rule == "off" else f"{selection.rule} {selection.threshold:g}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
