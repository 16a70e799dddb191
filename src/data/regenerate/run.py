"""Regenerate the answers in a dataset with the target, so that the drafter trains on the target's own outputs.

    python -m data.regenerate +experiment=qwen3_8b                                          # in this process
    python -m data.regenerate +experiment=qwen3_8b regenerate.backend=server \\
        regenerate.server.url=http://localhost:8000/v1                                     # with a running server
    python -m train +experiment=qwen3_8b data.path=checkpoints/qwen3_8b/regenerated.jsonl

Multi-turn conversations are answered turn by turn. To resume a killed run, or to answer questions that were
appended to the data, repeat the command: every sample has an id, and finished samples are skipped. Two files are
written next to the output: `.settings.json` (settings and counts by outcome) and `.dropped.jsonl` (dropped
conversations and why). The settings are under `regenerate` in conf/config.yaml.
"""

import sys
from pathlib import Path
from typing import NoReturn

from filelock import FileLock, Timeout
from omegaconf import DictConfig

import data.threads  # before torch  # noqa: F401
from data.config.compose import plain
from data.config.unused import Unused, check_unused
from data.config.validate import check_choices, command_line
from data.errors import UserError
from data.regenerate.conversation import SAMPLING, Backend, Checker, Sample, Sampling, beside
from data.regenerate.output import dropped_file, entry_of, write_output
from data.regenerate.progress import Progress
from data.regenerate.questions import Questions, read_questions
from data.regenerate.sample_log import SampleLog, is_kept
from data.regenerate.server_settings import check_server
from data.regenerate.settings import SettingsFile, settings_file
from data.sources.readers import open_sources
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
    check_server(config)


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
    questions = read_questions(sources, data["bad_records"], Path(config.run_dir) / "regenerate_rejects.jsonl")
    record = settings_file(config, sources, beside(output, ".settings.json"))
    if not isinstance(config.overwrite, bool):
        raise UserError(
            f"overwrite={config.overwrite}: expected true or false; stage names are only valid for python -m train."
        )
    log, starts_over = _open_log(record, output, config.overwrite)
    replaces_output = starts_over and output.exists()
    log.assign(questions.samples())
    total, remaining = len(questions), sum(not log.has(asked) for asked in questions.samples())
    if not remaining and not starts_over and not log.path.exists() and record.same_questions():
        say(f"already finished: {output}")
        return
    if remaining:
        _answer(config, questions, log, record, replaces_output=replaces_output)
    finished = [asked for asked in questions.samples() if log.has(asked)]
    unanswered = total - len(finished)
    if replaces_output and output.stat().st_size and not log.kept():
        _keep_output(output, log, record, unanswered)
    summary = write_output(log, finished, output)
    record.write(outcomes=dict(summary.outcomes) | ({"unanswered": unanswered} if unanswered else {}))
    log.remove()
    say(f"{summary.describe()}\n{output}")
    if len(finished) > summary.kept or summary.removed:
        say(f"dropped conversations: {dropped_file(output)}")
    if unanswered:
        raise UserError(
            f"{unanswered:,} of {total:,} conversations are not in {output}, because the server failed on them "
            "repeatedly. Run the same command to ask them again, or train without them."
        )
    if not summary.kept:
        raise UserError(f"No answers were kept. The reasons are listed in {dropped_file(output)}.")


def _keep_output(output: Path, log: SampleLog, record: SettingsFile, unanswered: int) -> NoReturn:
    """End a run that was to replace the output and kept no answer.

    Raises:
        UserError: always, with the outcomes.
    """
    outcomes = log.most_common_outcomes(3)
    if unanswered:
        outcomes.append(f"{unanswered:,} unanswered, because the server failed repeatedly")
    log.remove()  # first: with the old settings, a next run would use its samples
    record.restore()
    raise UserError(
        f"No new answers were kept, so {output} is unchanged: {'; '.join(outcomes)}. Fix the cause and run the same "
        "command to ask all questions again."
    )


def _open_log(record: SettingsFile, output: Path, overwrite: bool) -> tuple[SampleLog, bool]:
    """Return the finished samples that can be used, and whether the run starts over, without those of the output.

    If an earlier run was to replace the output and failed before its first answer, the output stays valid.

    Raises:
        UserError: the output has answers with different settings, or exists without a record of its settings.
    """
    unfinished = beside(output, ".unfinished.jsonl")
    if overwrite and record.is_damaged():
        record.path.unlink()
    if not record.path.exists() and output.exists() and not overwrite:
        raise UserError(
            f"{output} exists without a record of its settings ({record.path.name}). Choose a different "
            "regenerate.output, or set overwrite=true to replace the file."
        )
    changes = record.changes()
    resumes = unfinished.exists() and record.path.exists() and (record.discards_output() or not output.exists())
    if overwrite and (changes or not resumes):  # an interrupted overwrite with the same settings is resumed
        unfinished.unlink(missing_ok=True)
        return SampleLog(unfinished), True
    if not overwrite and record.discards_output() and not SampleLog(unfinished).kept():
        unfinished.unlink(missing_ok=True)
        record.restore()
        return _open_log(record, output, overwrite)
    starts_over = record.discards_output()
    log = SampleLog(unfinished, () if starts_over else (output, dropped_file(output)))
    if not changes:
        return log, starts_over
    if log.kept():
        raise UserError(
            f"{output} was started with different settings: {changes}.\n"
            "Choose a different regenerate.output, or set overwrite=true to start over."
        )
    log.remove()
    return SampleLog(unfinished), True


def _answer(
    config: DictConfig, questions: Questions, log: SampleLog, record: SettingsFile, *, replaces_output: bool
) -> None:
    """Answer all unanswered questions. Every finished sample is written to the log immediately."""
    backend, checker = _backend(config)  # before any file is written, since it may raise UserError
    record.write(replaces_output=replaces_output)
    remaining = sum(not log.has(asked) for asked in questions.samples())
    with Progress(len(questions), len(questions) - remaining) as progress:

        def on_finish(sample: Sample) -> None:
            log.add(sample.id, entry_of(sample))
            progress.finish(kept=is_kept(str(sample.outcome)))

        samples = questions.unanswered(log.has, checker)
        backend.run(samples, on_finish, answered_before=log.kept() > 0, on_tokens=progress.tokens)


def _backend(config: DictConfig) -> tuple[Backend, Checker]:
    # Imported late, because loading transformers takes seconds.
    from data.preprocess.chat_template import load_encoder
    from data.regenerate.trainable import TrainingChecker

    chosen = plain(config, "data", "model", "regenerate")
    sampling = Sampling(seed=config.seed, **{key: chosen["regenerate"][key] for key in SAMPLING})
    target, template_kwargs = chosen["model"]["target"], chosen["data"]["template_kwargs"]
    encoder, tokenizer = load_encoder(target, template_kwargs)
    checker = TrainingChecker(encoder)
    if chosen["regenerate"]["backend"] == "server":
        from data.regenerate.server_backend import ServerBackend

        return ServerBackend(sampling, template_kwargs, encoder, **chosen["regenerate"]["server"]), checker
    from data.regenerate.local_backend import LocalBackend

    encoder.check_kwargs(template_kwargs, sys.argv[1:], say)
    draft = chosen["regenerate"]["draft"]
    local = LocalBackend(target, tokenizer, encoder, sampling, draft=draft, **chosen["regenerate"]["local"])
    return local, checker
