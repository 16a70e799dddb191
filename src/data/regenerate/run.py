"""Regenerate the answers in a dataset with the target, so that the drafter trains on the target's own outputs.

    python -m data.regenerate +experiment=qwen3_8b                                          # in this process
    python -m data.regenerate +experiment=qwen3_8b regenerate.backend=server \\
        regenerate.server.url=http://localhost:8000/v1                                     # with a running server
    python -m train +experiment=qwen3_8b data.path=checkpoints/qwen3_8b/regenerated.jsonl

Multi-turn conversations are answered turn by turn. To resume a killed run, repeat the command: every sample has an id,
and finished samples are skipped. Two files are written next to the output: `.settings.json` (settings and counts by
outcome) and `.dropped.jsonl` (dropped conversations and why). The settings are under `regenerate` in conf/config.yaml.
"""

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig

import data.threads  # before torch  # noqa: F401
from data.config.compose import plain
from data.config.unused import Unused, check_unused
from data.config.validate import check_choices, command_line
from data.errors import BadRecord, UserError
from data.regenerate.conversation import KEPT, Backend, Sample, Sampling
from data.regenerate.progress import Progress
from data.regenerate.sample_log import SampleLog
from data.sources.chunks import RawRecord
from data.sources.readers import Source, fingerprint, open_sources, read_all
from data.sources.records import questions
from data.sources.rejects import Reject, handle_rejects, printable, reject
from data.terminal import run_command, say

UNUSED = (
    Unused(("regenerate.server",), lambda c: c.regenerate.backend != "server", "regenerate.backend is local"),
    Unused(
        ("regenerate.local", "regenerate.draft"),
        lambda c: c.regenerate.backend != "local",
        "regenerate.backend is server, which loads a drafter itself",
    ),
    Unused(
        ("regenerate.top_p",),
        lambda c: c.regenerate.temperature == 0,
        "regenerate.temperature=0 selects greedy decoding",
    ),
    Unused(("regenerate.repeat_words",), lambda c: c.regenerate.repeat_times == 0, "regenerate.repeat_times is 0"),
)
SAMPLING = ("temperature", "top_p", "max_new_tokens", "drop_cut_off", "repeat_words", "repeat_times")


def main() -> None:
    """Run `python -m data.regenerate`."""
    run_command(_command, "stopped; run the same command to resume")


def _command() -> None:
    config = command_line(__doc__)
    check_regeneration(config)
    check_unused(config, sys.argv[1:], UNUSED)
    regenerate(config)


def check_regeneration(config: DictConfig) -> None:
    """Check the `regenerate` settings for invalid choices, missing files and invalid combinations.

    Raises:
        UserError: a setting is invalid.
    """
    check_choices(config, {"regenerate.backend": ("local", "server")})
    from data.preprocess.templates import check_reserved  # imported late: loads transformers

    check_reserved(plain(config, "data")["data"]["template_kwargs"])
    check_choices(config, {"regenerate.local.device": ("auto", "cpu", "cuda")})
    if config.regenerate.repeat_times < 2 and config.regenerate.repeat_times != 0:
        raise UserError(
            f"regenerate.repeat_times={config.regenerate.repeat_times}: expected 0 (disabled) or at least 2."
        )
    server = config.regenerate.server
    if config.regenerate.backend == "server" and not str(server.url).startswith(("http://", "https://")):
        raise UserError(f"regenerate.server.url={server.url!r}: expected a URL starting with http:// or https://.")
    if config.regenerate.backend == "server" and server.model is None:
        raise UserError("regenerate.server.model=null: set it to the target's model name on the server.")
    if server.key_file is not None and not Path(server.key_file).is_file():
        raise UserError(
            f"regenerate.server.key_file={server.key_file!r}: no such file. Set it to an existing file or null."
        )


def regenerate(config: DictConfig) -> None:
    """Answer all unanswered questions, then write the output in question order.

    Raises:
        UserError: there are bad records, the settings differ from those of the interrupted run, another process is
            writing the output, the server is unreachable, or no answer was kept.
    """
    output = Path(config.regenerate.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{output}.lock", blocking=False):
            _regenerate(config, output)
    except Timeout:
        raise UserError(
            f"{output}: another process is writing this file. Wait for it, or set a different regenerate.output."
        ) from None


def _regenerate(config: DictConfig, output: Path) -> None:
    data = plain(config, "data")["data"]
    sources = open_sources(data["path"], split=data["split"], max_records=data["max_records"], warn=say)
    ids = sample_ids(sources, data["bad_records"], Path(config.run_dir) / "regenerate_rejects.jsonl")
    settings, record = _settings(config, sources), output.with_suffix(".settings.json")
    if not isinstance(config.overwrite, bool):
        raise UserError(
            f"overwrite={config.overwrite}: expected true or false; stage names are only valid for python -m train."
        )
    if _finished(record, settings, output, config.overwrite):
        say(f"already finished: {output}")
        return
    log = SampleLog(output.with_suffix(".unfinished.jsonl"))
    remaining = sum(sample_id not in log for sample_id in ids.values())
    backend = _backend(config) if remaining else None  # before any file is written, since it may raise UserError
    _write_json(record, {"settings": settings, "written_with": _written_with(config)})
    with Progress(len(ids), len(ids) - remaining) as progress:

        def on_finish(sample: Sample) -> None:
            outcome = str(sample.outcome)
            entry = {"outcome": outcome, "tokens": sample.tokens, "messages": sample.messages}
            log.add(sample.id, entry)
            progress.finish(kept=outcome == KEPT)

        if backend:
            unfinished = _unfinished(sources, ids, log)
            backend.run(unfinished, on_finish, answered_before=len(log) > 0, on_tokens=progress.tokens)
    outcomes = _write_output(log, list(ids.values()), output)
    _write_json(record, {"settings": settings, "written_with": _written_with(config), "outcomes": outcomes})
    log.remove()
    summary = ", ".join(f"{count:,} {outcome}" for outcome, count in outcomes.items())
    say(f"{len(ids):,} conversations: {summary}\n{output}")
    if not outcomes.get(KEPT):
        raise UserError(f"No answers were kept. The reasons are listed in {output.with_suffix('.dropped.jsonl')}.")


def sample_ids(sources: list[Source], bad_records: str, rejects: Path) -> dict[tuple[int, int], str]:
    """Map the (source index, position) of each sample to its id: the record's `id` field, otherwise file and line.

    Records that are invalid or have a duplicate id are written to `rejects`.

    Raises:
        UserError: there are bad records and `bad_records` is "stop", or no record is usable.
    """
    ids: dict[tuple[int, int], str] = {}
    first_use: dict[str, str] = {}  # id -> file and line
    labels = Counter(source.reader.label for source in sources)
    bad: list[Reject] = []
    for number, source, raw in _numbered(sources):
        label = source.reader.label
        label = label if labels[label] == 1 else f"{number}/{label}"
        try:
            raw.parse(questions)
            record_id = raw.value.get("id")
            sample_id = f"{label}:{raw.position}" if record_id is None else str(record_id)
            if printable(sample_id) != sample_id:
                raise BadRecord("the id contains a lone surrogate, which is not valid Unicode")
            if sample_id in first_use:
                raise BadRecord(f"duplicate id {sample_id!r}, first used at {first_use[sample_id]}")
        except BadRecord as error:
            bad.append(reject(source, raw.position, str(error), raw.as_text()))
        else:
            ids[number, raw.position] = sample_id
            first_use[sample_id] = source.reader.location(raw.position)
    handle_rejects(bad, len(ids) + len(bad), bad_records, rejects)
    if not ids:
        raise UserError(f"data.path contains no questions to answer. The rejected records are listed in {rejects}.")
    return ids


def _numbered(sources: list[Source]) -> Iterator[tuple[int, Source, RawRecord]]:
    return ((number, source, raw) for number, source in enumerate(sources) for _, raw in read_all([source]))


def _unfinished(sources: list[Source], ids: dict[tuple[int, int], str], log: SampleLog) -> Iterator[Sample]:
    """Yield the conversations that are not in the log yet."""
    for number, _, raw in _numbered(sources):
        sample_id = ids.get((number, raw.position))
        if sample_id is not None and sample_id not in log:
            yield Sample(sample_id, raw.parse(questions).messages)


def _backend(config: DictConfig) -> Backend:
    chosen = plain(config, "data", "model", "regenerate")
    sampling = Sampling(seed=config.seed, **{key: chosen["regenerate"][key] for key in SAMPLING})
    template_kwargs = chosen["data"]["template_kwargs"]
    # Imported late, because the server backend does not need torch.
    if chosen["regenerate"]["backend"] == "server":
        from data.regenerate.server_backend import ServerBackend

        return ServerBackend(sampling, template_kwargs, **chosen["regenerate"]["server"])
    from data.preprocess.chat_template import load_encoder
    from data.regenerate.local_backend import LocalBackend

    target = chosen["model"]["target"]
    encoder, tokenizer = load_encoder(target, template_kwargs)
    encoder.check_kwargs(template_kwargs, sys.argv[1:], say)
    draft = chosen["regenerate"]["draft"]
    return LocalBackend(target, tokenizer, encoder, sampling, draft=draft, **chosen["regenerate"]["local"])


def _settings(config: DictConfig, sources: list[Source]) -> dict[str, Any]:
    """Return all settings and fingerprints that affect the answers."""
    chosen, target = plain(config, "regenerate")["regenerate"], plain(config, "model")["model"]["target"]
    settings = {key: chosen[key] for key in (*SAMPLING, "backend")}
    settings |= {"seed": config.seed, "template_kwargs": plain(config, "data")["data"]["template_kwargs"]}
    settings["questions"] = fingerprint(sources)
    if chosen["backend"] == "server":
        return settings | {"model": chosen["server"]["model"], "extra": chosen["server"]["extra"]}
    from data.preprocess.chat_template import load_encoder
    from data.sources.hub_commit import commit_of

    if target["name"] is None:
        raise UserError(
            "model.target.name=null: a target with random weights cannot answer. Set it to a path or Hub ID."
        )
    try:
        commit = None if Path(target["name"]).is_dir() else commit_of(target["name"], target["revision"])
    except (OSError, ValueError) as error:
        raise UserError(f"model.target.name={target['name']!r}: failed to load the target's config. {error}") from error
    settings["target"] = {"name": target["name"], "commit": commit, "dtype": target["dtype"]}
    encoder, _ = load_encoder(target, settings["template_kwargs"])
    settings["encoder"] = hashlib.sha256(json.dumps(encoder.fingerprint(), default=str).encode()).hexdigest()
    files = [f for f in sorted(Path(target["name"]).glob("*")) if f.suffix in (".json", ".safetensors")]
    settings["files"] = {file.name: _sha256(file) for file in files}
    return settings


def _written_with(config: DictConfig) -> dict[str, Any]:
    """Return settings and versions that should not affect the answers but are recorded with them."""
    chosen = plain(config, "regenerate")["regenerate"]
    where = {key: value for key, value in chosen[chosen["backend"]].items() if key != "key_file"}
    where |= {"draft": chosen["draft"]} if chosen["backend"] == "local" else {}
    return {**where, "versions": {name: version(name) for name in ("torch", "transformers")}}


def _finished(record: Path, settings: dict[str, Any], output: Path, overwrite: bool) -> bool:
    """Return whether the output is complete. With `overwrite`, discard a run that finished or used different settings.

    Raises:
        UserError: the output was started with different settings, or exists without a record of its settings.
    """
    unfinished = output.with_suffix(".unfinished.jsonl")
    if not record.exists():
        if overwrite:
            return False
        if output.exists():
            raise UserError(
                f"{output} exists without a record of its settings ({record.name}). Choose a different "
                "regenerate.output, or set overwrite=true to replace the file."
            )
        return False
    settings = json.loads(json.dumps(settings))  # JSON round trip, for comparison with the stored settings
    before = json.loads(record.read_text(encoding="utf-8"))
    changed = sorted(key for key in settings | before["settings"] if settings.get(key) != before["settings"].get(key))
    if overwrite and (changed or not unfinished.exists()):
        unfinished.unlink(missing_ok=True)  # an interrupted run with the same settings is resumed instead
        return False
    if changed:
        changes = "; ".join(f"{key}: {before['settings'].get(key)} -> {settings.get(key)}" for key in changed)
        raise UserError(
            f"{output} was started with different settings: {changes}.\n"
            "Choose a different regenerate.output, or set overwrite=true to start over."
        )
    return output.exists() and not unfinished.exists()


def _write_output(log: SampleLog, ids: list[str], output: Path) -> dict[str, int]:
    """Write kept and dropped conversations to separate files in question order, and return counts by outcome."""
    outcomes: Counter[str] = Counter()
    files = [output, output.with_suffix(".dropped.jsonl")]
    temporary = [file.with_suffix(file.suffix + ".tmp") for file in files]
    with temporary[0].open("w", encoding="utf-8") as kept, temporary[1].open("w", encoding="utf-8") as dropped:
        for entry in log.read(ids):
            outcome = entry.pop("outcome")
            del entry["tokens"]
            outcomes[outcome.partition(":")[0]] += 1
            entry |= {} if outcome == KEPT else {"reason": outcome}
            (kept if outcome == KEPT else dropped).write(json.dumps(entry, ensure_ascii=False) + "\n")
    for new, file in zip(temporary, files, strict=True):
        os.replace(new, file)
    return dict(outcomes)


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
