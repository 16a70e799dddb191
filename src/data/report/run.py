"""Report statistics of the training data before spending GPU time.

    python -m data.report +experiment=qwen3_8b

Reads, tokenizes and packs the data exactly as training does; training reuses the cached tokens. Reports records by
outcome, rejection reasons, lengths, supervised tokens, answers by kind, length and language, packing efficiency and
overlap with the evaluation prompts.
Prints the report and writes it to checkpoints/<name>/data_report/ as Markdown with plots. Bad records are counted and
listed; data.bad_records has no effect here.
"""

import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from omegaconf import DictConfig
from tqdm import tqdm

from data.config.compose import plain
from data.config.validate import command_line
from data.errors import BadRecord
from data.preprocess.chat_template import ChatEncoder, load_encoder
from data.preprocess.prepare import Prepared, describe_answers, prepare
from data.preprocess.table import TokenizeSettings
from data.preprocess.tokenized import Documents
from data.report import statistics
from data.report.answers import AnswerCounter, Answers, answer_sections
from data.report.prompts import read_prompts
from data.report.section import Section, markdown, print_report
from data.sources.kinds import declared
from data.sources.readers import Source, open_sources, read_all
from data.sources.records import parsed
from data.sources.rejects import common_reasons
from data.terminal import run_command, say

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

SHOWN_FILES = 20  # number of files to list
SHOWN_TOKENS = 400  # number of tokens of the example conversation to show


def main() -> None:
    """Run `python -m data.report`."""
    run_command(lambda: write_report(command_line(__doc__)), "stopped; if tokenization was complete, it stays cached")


def write_report(config: DictConfig) -> None:
    """Print the report and write it to the run directory.

    Raises:
        UserError: the tokenizer or the data cannot be loaded, or the data contains no usable conversation.
    """
    settings = plain(config, "data", "model", "stage")
    data, draft = settings["data"], settings["model"]["draft"]
    encoder, tokenizer = load_encoder(settings["model"]["target"], data["template_kwargs"])
    encoder.check_kwargs(data["template_kwargs"], sys.argv[1:], say)
    prompts = read_prompts(config, encoder)
    sources = open_sources(data["path"], split=data["split"], max_records=data["max_records"], warn=say)
    folder = Path(config.run_dir) / "data_report"
    prepared = prepare(
        sources,
        encoder,
        **{key: data[key] for key in ("max_seq_len", "truncation", "num_proc", "validation_records")},
        bad_records="skip",
        block_size=draft["block_size"],
        seed=config.seed,
        rejects=folder / "rejects.jsonl",
    )
    answers, overlap = read_again(prepared.documents, sources, prompts)
    sections = [
        _records(prepared, sources),
        *_rejects(prepared, folder),
        _lengths(prepared),
        _supervision(prepared.documents, sources, encoder, TokenizeSettings(data["max_seq_len"], data["truncation"])),
        *answer_sections(answers),
        _rows(prepared, settings["stage"]["attention_tuning"]),
        _overlap(overlap, prompts, data["prompts"]),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    _plot(prepared, data["max_seq_len"], folder)
    example = _example(prepared, tokenizer)
    title = f"Data report for {config.name}: {data['path']}"
    print_report(title, sections, example)
    (folder / "report.md").write_text(markdown(title, sections, example), encoding="utf-8")
    say(f"\nreport and plots: {folder / 'report.md'}")


def _records(prepared: Prepared, sources: list[Source]) -> Section:
    documents = prepared.documents
    outcomes = documents.outcomes()
    meaning = {
        "kept": "in full",
        "truncated": "answers beyond data.max_seq_len dropped (data.truncation=turn), or cut at this length (token)",
        "too long": "dropped: the conversation (data.truncation=drop) or its first exchange (turn) is too long",
        "no anchor": "dropped: no two consecutive supervised tokens, so no block can start (at an anchor)",
        "bad": "rejected",
    }
    total = sum(outcomes.values())
    rows = [[name, f"{count:,}", f"{count / total:.1%}", meaning[name]] for name, count in outcomes.items()]
    lines = [f"{s.reader.name}: {s.take:,} of {s.reader.count:,} records" for s in sources[:SHOWN_FILES]]
    lines += [f"and {len(sources) - SHOWN_FILES:,} more files"] if len(sources) > SHOWN_FILES else []
    duplicates = statistics.duplicates(documents)
    return Section(
        f"{total:,} records",
        ["outcome", "records", "fraction", ""],
        rows,
        [*lines, f"{duplicates:,} conversations are exact duplicates of earlier ones."],
    )


def _rejects(prepared: Prepared, folder: Path) -> list[Section]:
    entries = [*prepared.documents.rejects(), *prepared.documents.refused()]
    if not entries:
        return []
    rows = [[reason, f"{count:,}", where] for reason, count, where in common_reasons(entries, 10)]
    return [Section("Rejected", ["reason", "records", "first at"], rows, [f"Full list: {folder / 'rejects.jsonl'}"])]


def _lengths(prepared: Prepared) -> Section:
    documents = prepared.documents
    before, after = documents.column("tokens"), documents.lengths
    truncated, dropped = documents.lost_tokens()
    total = max(1, int(before.sum()) + dropped)
    rows = [
        ["document", *(f"{x:,}" for x in statistics.percentiles(before))],
        ["after truncation", *(f"{x:,}" for x in statistics.percentiles(after))],
        ["longest answer", *(f"{x:,}" for x in statistics.percentiles(documents.column("longest")))],
    ]
    note = (
        f"{int(after.sum()):,} tokens kept; {truncated:,} lost to truncation ({truncated / total:.2%}) and "
        f"{dropped:,} to dropping whole conversations ({dropped / total:.2%})."
    )
    return Section("Length in tokens", ["", "min", "10%", "median", "90%", "max"], rows, [note])


def _supervision(
    documents: Documents, sources: list[Source], encoder: ChatEncoder, settings: TokenizeSettings
) -> Section:
    roles = statistics.roles(sources, encoder, settings)
    total = sum(roles.tokens.values())
    rows = [
        [role, f"{count:,}", f"{count / total:.1%}", f"{roles.supervised[role] / count:.1%}"]
        for role, count in sorted(roles.tokens.items())
    ]
    note = (
        f"Counted after truncation in {roles.conversations:,} conversations, spread evenly over the data. `template` "
        "tokens are added by "
        "the chat template: headers and end-of-turn tokens. The assistant's end-of-turn tokens are supervised. If a "
        "conversation becomes several documents, the later ones repeat earlier answers as unsupervised history."
    )
    notes = [describe_answers(documents), *_answer_notes(documents.answers()), note]
    return Section("Supervised tokens by role", ["role", "tokens", "fraction", "supervised"], rows, notes)


def _answer_notes(counts: dict[str, int]) -> list[str]:
    """Return notes on answers that differ, or may differ, from what the target would write."""
    texts = {
        "no_end": "have no end-of-turn token, because the chat template does not write one after them.",
        "other_end": "end with a token that is not one of the target's stop tokens, so generation does not stop there. "
        "Check eos_token_id in the target's generation_config.json.",
        "cut_off": "were cut off at the token limit; they are supervised without an end token.",
        "no_text": "are trained on without the text beside their tool calls: the chat template does not write it.",
        "no_reasoning": "are trained on without their reasoning: neither the prompt nor the chat template renders it.",
    }
    return [f"{counts[name]:,} answers {text}" for name, text in texts.items() if counts[name]]


def _rows(prepared: Prepared, stage: dict[str, Any]) -> Section:
    rows = prepared.training
    anchors = statistics.anchors_per_row(prepared.documents, rows, prepared.training_indices)
    num_anchors, epochs = stage["num_anchors"], stage["steps"] * stage["global_batch_size"] / len(rows)
    least, tenth, median, ninetieth, most = statistics.percentiles(anchors)
    table = [
        ["training rows", f"{len(rows):,}, each {rows.max_seq_len:,} tokens long"],
        ["validation rows", f"{len(prepared.validation):,}"],
        ["packing efficiency", f"{rows.efficiency():.1%}"],
        ["anchors per row", f"median {median:,}, range {least:,} to {most:,}; 80% between {tenth:,} and {ninetieth:,}"],
        [f"rows with fewer than num_anchors={num_anchors}", f"{(anchors < num_anchors).mean():.1%}"],
        [
            "epochs of attention tuning",
            f"{epochs:.2f} ({stage['steps']:,} steps, {stage['global_batch_size']} rows each)",
        ],
    ]
    return Section("Rows", ["", ""], table)


def read_again(documents: Documents, sources: list[Source], prompts: list[Any]) -> tuple[Answers, statistics.Overlap]:
    """Read all records once more: classify their supervised answers and compare their questions with the prompts."""
    counter, overlap = AnswerCounter(documents), statistics.Overlap(prompts)
    total = sum(source.take for source in sources)
    progress = tqdm(read_all(sources), total=total, desc="reading answers and questions", unit=" records", delay=2)
    for index, (source, raw) in enumerate(progress):
        try:
            found = raw.parse(parsed)
        except BadRecord:
            continue
        counter.add(index, found, source.kind or declared(raw.value))
        overlap.add(source, raw, found.messages)
    return counter.answers, overlap


def _overlap(found: statistics.Overlap, prompts: list[Any], path: Any) -> Section:
    rows = [
        ["an identical question", f"{found.identical:,}"],
        [f"{statistics.OVERLAP_WORDS} consecutive words in common", f"{found.partial:,}"],
    ]
    title = f"Overlap with the {len(prompts):,} evaluation prompts"
    return Section(title, ["training records with", ""], rows, [f"data.prompts: {path}", *found.locations])


def _example(prepared: Prepared, tokenizer: Any) -> list[tuple[str, bool]]:
    """Return the first SHOWN_TOKENS tokens of the first training conversation, as (text, supervised) spans."""
    document = prepared.training.documents[0]
    ids, supervised = document.input_ids[:SHOWN_TOKENS], document.supervised[:SHOWN_TOKENS]
    edges = [0, *(np.flatnonzero(np.diff(supervised.astype(int))) + 1).tolist(), len(ids)]
    return [(tokenizer.decode(ids[a:b].tolist()), bool(supervised[a])) for a, b in zip(edges, edges[1:], strict=False)]


def _plot(prepared: Prepared, max_seq_len: int, folder: Path) -> None:
    documents, rows = prepared.documents, prepared.training
    figure, axes = plt.subplots(figsize=(6, 4))
    axes.hist(documents.column("tokens"), bins=60, color="#2878b5", label="conversations")
    axes.axvline(max_seq_len, color="#c8443c", linestyle="--", label=f"row length: {max_seq_len:,} tokens")
    axes.set(xlabel="tokens", ylabel="conversations", title="Length before truncation")
    _save(figure, axes, folder / "lengths.png")
    figure, axes = plt.subplots(figsize=(6, 4))
    anchors = statistics.anchors_per_row(documents, rows, prepared.training_indices)
    axes.hist(anchors, bins=60, color="#2878b5", label="rows")
    axes.set(xlabel="anchors", ylabel="rows", title="Anchors per row")
    _save(figure, axes, folder / "anchors.png")


def _save(figure: Any, axes: Any, path: Path) -> None:
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
