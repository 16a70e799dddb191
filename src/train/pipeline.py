"""Run the chosen stages in order, each once."""

from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from lightning import seed_everything
from omegaconf import DictConfig

from data.errors import UserError
from models.draft_config import target_identity
from train import stages
from train.context import Resources
from train.disk_space import ADAPTER, check_disk
from train.endings.preemption import set_training
from train.evaluate.plots import plot_losses
from train.evaluate.throughput import device_name
from train.loop.loggers import check_loggers
from train.names import STAGES, TRAINED
from train.publish.model_card import is_outdated, write_card
from train.publish.upload import check_access, destination, push
from train.resume.identity import check_inputs, settings_of
from train.resume.progress import FINISHED, RESTART, next_action
from train.run_dir.disk import DiskError, as_user_error, check_no_link, remove_tree
from train.run_dir.drafter_file import WEIGHTS, check_fits, facts_in, facts_of_export, finished_weights
from train.run_dir.lock import RunLock
from train.run_dir.state import StageRecord, read_record
from train.settings.derived import check_device, device
from train.terminal import rank, say


def run(config: DictConfig) -> None:
    """Run the chosen stages in order, skipping finished ones.

    Raises:
        UserError: the settings conflict with each other or with the run directory, the input of a stage is missing,
            another process is using the run directory, or the disk is full or not writable.
    """
    set_training(False)  # from here on, a signal may interrupt the process at any point
    check_device(config)
    check_loggers(config)
    lock = RunLock(Path(config.run_dir))
    try:
        _run(config, Path(config.run_dir), lock)
    except Exception as error:
        cause = as_user_error(error)
        if cause is error:
            raise
        raise cause from error
    finally:
        lock.release()


def _run(config: DictConfig, run_dir: Path, lock: RunLock) -> None:
    resources = Resources(config)
    if config.export.push_to_hub and rank() == 0:
        check_access(destination(config), target_identity(resources.target_config))  # fail before training, not after
    chosen = [stage for stage in STAGES if stage in config.stages]
    for number, stage in enumerate(chosen, start=1):
        if rank() and stage not in TRAINED:
            continue  # only rank 0 exports and evaluates
        say(f"[{number}/{len(chosen)}] {stage}")
        _run_stage(config, stage, resources, lock, later=chosen[number:])
    if rank() == 0 and read_record(run_dir / "records" / "export.done.json"):
        _describe_and_push(config, run_dir)


def _describe_and_push(config: DictConfig, run_dir: Path) -> None:
    """Write the export's model card and, if `export.push_to_hub` is set, upload the export.

    Raises:
        UserError: the export to be uploaded is missing or outdated, or the Hub rejected the upload.
    """
    exported = run_dir / "export"
    problem = fix = ""
    if not (exported / "config.json").exists():
        problem, fix = f"{exported / 'config.json'} is missing", "Run stages=[export,evaluate]"
    elif is_outdated(run_dir):
        problem, fix = f"{exported} is older than the trained weights", "Run stages=[export,evaluate] overwrite=true"
    if problem:
        if config.export.push_to_hub:
            raise UserError(f"{problem}. {fix} before pushing to the Hub.")
        say(f"warning: {problem}; the model card was not updated. {fix}.")
        return
    write_card(run_dir)
    if config.export.push_to_hub:
        say(f"pushed to {push(exported, destination(config))}")


def _run_stage(config: DictConfig, stage: str, resources: Resources, lock: RunLock, later: list[str]) -> None:
    run_dir = Path(config.run_dir)
    directory = run_dir / stage
    check_inputs(stage, run_dir)
    drafter = _checked_drafter(config, stage, run_dir, resources)
    record = StageRecord(run_dir, stage, settings_of(config, stage, run_dir, resources))
    todo = next_action(config, stage, record)
    if todo == FINISHED:
        say(f"    already finished: {directory} (overwrite={stage} reruns it)")
        if rank() == 0 and (directory / "checkpoints").exists():  # the run was killed just after the stage finished
            _drop_left_over(config, stage, record, lock)
        return
    if stage in TRAINED:
        stages.checked_trainer(config, stage, directory)  # fail before the data is read
    if rank() == 0:
        lock.acquire()
        if next_action(config, stage, record, say=lambda text: None) != todo:
            raise UserError(f"{directory}: another process changed this stage in the meantime. Rerun the command.")
        _remove_temporary(run_dir)
        if todo == RESTART and config.overwrite is not False:  # later stages are rerun as well
            check_no_link(*(run_dir / name for name in (stage, *later) if name != "export"))
        check_disk(config, resources, run_dir, [stage, *later])
    else:
        lock.refuse_other_jobs()
    resources.check(stage)
    if stage in TRAINED and todo == RESTART:
        stages.untrained(config, stage, resources)  # fail before anything is deleted
    if rank() == 0:
        if todo == RESTART:
            _clear(config, stage, record, later)
        record.begin(restart=todo == RESTART)
    if stage in TRAINED:
        _barrier()  # export and evaluation run on rank 0 only
    seed_everything(config.seed, verbose=False)
    result = getattr(stages, stage)(config, directory, resources)
    if rank() == 0:
        if "adapter" in result:
            say(f"    PEFT adapter: {result['adapter']}")
        files = stages.result_files(stage, directory)
        origin = {"drafter": drafter} if drafter else {}
        record.finish(result, files, overrides=_overrides(), hardware=_hardware(config), **origin)
        # Only now: until the stage is recorded as finished, a restart resumes from the checkpoints.
        _drop_checkpoints(directory)
        if stage in TRAINED:
            plot_losses({name: run_dir / name for name in TRAINED}, run_dir / "loss.png")


def _checked_drafter(config: DictConfig, stage: str, run_dir: Path, resources: Resources) -> dict[str, Any]:
    """Return the training setup of the drafter that a stage starts from, or an empty dict for the first stage.

    Raises:
        UserError: the settings describe a different drafter, or the drafter's files are damaged or contain no setup.
    """
    target = resources.target_identity
    if stage == "attention_tuning":
        return {}
    if stage == "evaluate":
        source, facts = run_dir / "export", facts_of_export(run_dir, target)
    else:
        tuned = run_dir / "attention_tuning" / WEIGHTS
        source = tuned if stage == "bonus_calibration" else finished_weights(run_dir)
        facts = facts_in(source, target)
    check_fits(source, facts, config, target, stage)
    return facts


def _clear(config: DictConfig, stage: str, record: StageRecord, later: list[str]) -> None:
    """Delete records and files left by earlier runs of a stage and, with overwrite, the records of `later` stages.

    Raises:
        DiskError: a file of an earlier run cannot be deleted, so the stage cannot start.
    """
    before = record.begun.exists() or config.overwrite is not False
    record.drop()
    if config.overwrite is not False:
        for name in later:  # they depend on this stage: a restart must not treat them as finished
            StageRecord(record.run_dir, name, {}).drop()
    if before and stage != "export":  # export replaces its directory once the new one is complete
        remove_tree(record.run_dir / stage)
        if stage == "attention_tuning":
            remove_tree(record.run_dir / ADAPTER)


def _drop_checkpoints(directory: Path) -> None:
    """Delete the checkpoints of a finished stage. If this fails, their run ID keeps later runs from using them."""
    try:
        remove_tree(directory / "checkpoints")
    except DiskError as error:
        say(f"    {error}")


def _drop_left_over(config: DictConfig, stage: str, record: StageRecord, lock: RunLock) -> None:
    """Delete leftover checkpoints of a finished stage, unless another process is rerunning that stage."""
    directory = record.run_dir / stage
    try:
        lock.acquire()
    except UserError as error:
        say(f"    could not delete {directory / 'checkpoints'}: {error}")
        return
    if next_action(config, stage, record, say=lambda text: None) == FINISHED:
        _drop_checkpoints(directory)


def _remove_temporary(run_dir: Path) -> None:
    """Delete temporary files left by killed writers. The lock guarantees that no other process is writing."""
    parts = [
        run_dir,
        run_dir / "records",
        *(run_dir / stage / part for stage in STAGES for part in (".", "checkpoints")),
    ]
    for file in [file for part in parts for file in part.glob(".*.tmp")]:
        file.unlink(missing_ok=True)


def _overrides() -> list[str]:
    """Return Hydra's command-line overrides; empty if Hydra is not initialized."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def _hardware(config: DictConfig) -> str:
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return f"{ranks} x {device_name(torch.device(device(config)))}"


def _barrier() -> None:
    """Synchronize all ranks if an earlier stage has initialized the process group."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
