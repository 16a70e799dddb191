"""Decide whether a stage is finished, resumed or restarted, from its record, settings and files. Writes nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from data.errors import UserError
from train.names import STAGES, TRAINED
from train.resume.identity import differences
from train.run_dir.checkpoint_names import checkpoints_in
from train.run_dir.drafter_file import WEIGHTS
from train.run_dir.state import StageRecord, file_sha256, is_requeue_of, read_record
from train.terminal import say

FINISHED, RESUME, RESTART = "finished", "resume", "restart"
# Result files of each stage, for records written by earlier versions, which do not list them.
RESULTS = {stage: [f"{stage}/{WEIGHTS}"] for stage in TRAINED}
RESULTS |= {"export": ["export/config.json"], "evaluate": ["evaluate/report.json"]}


def named(config: DictConfig) -> list[str]:
    """Return the stages named in `overwrite`, or an empty list if it is true or false."""
    given: Any = config.overwrite
    return [] if isinstance(given, bool) else [given] if isinstance(given, str) else list(given)


def next_action(config: DictConfig, stage: str, record: StageRecord, say: Callable[[str], None] = say) -> str:
    """Return FINISHED, RESUME or RESTART. Read-only, so that all ranks reach the same decision.

    `overwrite=true` reruns export, evaluation and any training stage whose settings have changed; other training stages
    are kept. Stages named in `overwrite` are rerun, except when SLURM requeues the same job.

    Raises:
        UserError: continuing would mix two runs or lose a result; the message suggests how to proceed.
    """
    begun, done = read_record(record.begun), read_record(record.done)
    if stage in named(config) and not is_requeue_of((begun or {}).get("job")):
        return RESTART
    if begun and begun.get("dropped"):
        return RESTART
    if done is not None:
        return _finished(config, stage, record, done, say)
    return _begun(config, stage, record, begun) if stage in TRAINED else RESTART


def _finished(
    config: DictConfig, stage: str, record: StageRecord, done: dict[str, Any], say: Callable[[str], None]
) -> str:
    trained, again = stage in TRAINED, config.overwrite is True
    if "settings" not in done:
        if not trained:
            say(f"    {record.done} is empty or damaged; rerunning the stage")
            return RESTART
        raise UserError(
            f"{record.done} is empty or damaged, so the settings of the finished stage {stage} are unknown. Restore "
            f"the file or retrain with overwrite={stage}."
        )
    if changes := differences(done["settings"], record.settings, stage):
        if again:
            return RESTART
        raise _other_settings(config, stage, record, record.done, changes)
    files = dict.fromkeys(RESULTS[stage]) | (done.get("files") or {})
    missing = [name for name in files if not (record.run_dir / name).exists()]
    if missing and (again or not trained):
        say(f"    {record.run_dir / missing[0]} is missing; rerunning the stage")
        return RESTART
    if missing:
        raise UserError(
            f"{record.run_dir / missing[0]} is missing, but stage {stage} is recorded as finished. Restore the file or "
            f"retrain with overwrite={stage}."
        )
    if again and not trained:
        return RESTART
    for name, sha in files.items():
        if sha and file_sha256(record.run_dir / name) != sha:
            raise UserError(
                f"{record.run_dir / name} is damaged or was replaced: its SHA-256 is not the one recorded for stage "
                f"{stage}. Restore the file or rerun the stage with overwrite={stage}."
            )
    return FINISHED


def _begun(config: DictConfig, stage: str, record: StageRecord, begun: dict[str, Any] | None) -> str:
    """Return RESUME or RESTART for an unfinished training stage.

    Raises:
        UserError: as for `next_action`.
    """
    directory, again = record.run_dir / stage, config.overwrite is True
    checkpoints = checkpoints_in(directory / "checkpoints")
    if checkpoints and "settings" not in (begun or {}):
        if again:
            return RESTART
        raise UserError(
            f"{record.begun} is {'missing' if begun is None else 'empty or damaged'}, so the settings of the "
            f"{len(checkpoints)} checkpoints in {directory / 'checkpoints'} are unknown. Restore the file or restart "
            f"the stage with overwrite={stage}."
        )
    changes = differences(begun["settings"], record.settings, stage) if begun and "settings" in begun else []
    if checkpoints and changes and not again:
        raise _other_settings(config, stage, record, record.begun, changes)
    if checkpoints:
        return RESTART if changes else RESUME
    if (directory / WEIGHTS).exists() and not (again and changes):
        raise UserError(
            f"{directory / WEIGHTS} exists but has no record, and training would replace it. Move it elsewhere or "
            f"retrain with overwrite={stage}."
        )
    return RESTART if changes or not begun else RESUME  # no checkpoint yet, so changed settings lose no work


def _other_settings(config: DictConfig, stage: str, record: StageRecord, file: Path, changes: list[str]) -> UserError:
    after = [name for name in STAGES[STAGES.index(stage) + 1 :] if name in config.stages]
    again = [stage, *after]
    ways = f"overwrite={stage if len(again) == 1 else '[' + ','.join(again) + ']'}"
    what = "which needs no training" if stage not in TRAINED else "which discards the trained weights"
    text = f"{file}: this stage was run with different settings: {'; '.join(changes)}.\n"
    text += f"Restore the old values, choose a different name=..., or rerun {' and '.join(again)} with {ways}, {what}."
    if stage in TRAINED:
        text += " (overwrite=true does the same here; it keeps training stages whose settings are unchanged.)"
    return UserError(text)
