"""The composition root: the chosen stages in order, each once."""

import shutil
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from lightning import seed_everything
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from data.benchmarks import benchmark_fingerprint
from data.errors import UserError
from data.sources import fingerprint
from models.export import without_recommendation
from train import stages
from train.checks import STAGES, TRAINED
from train.hub import check_access, destination, of_target, push
from train.model_card import is_outdated, write_card
from train.preemption import set_training
from train.preset import accelerator, arithmetic, check_device, device
from train.report import plot_losses
from train.resources import Resources
from train.run_state import StageRecord, file_sha256, overwrites
from train.speed import device_name
from train.terminal import say

# What each stage starts from: files of earlier stages, without which it cannot run.
INPUTS = {
    "attention_tuning": [],
    "bonus_calibration": [f"attention_tuning/{stages.WEIGHTS}"],
    "export": [],  # stage 2 if it was finished, else stage 1: see `stages.finished_weights`
    "evaluate": ["export/config.json"],
}


# How often something is saved, how a step is cut into passes, and how many may fail, leave the outcome what it is.
WITHOUT_EFFECT = ("checkpoint_every", "keep_checkpoints", "rows_per_pass", "max_skipped_steps")


def run(config: DictConfig) -> None:
    """Run the chosen stages in order; finished ones are left as they are.

    Raises:
        UserError: settings that do not fit together, or a stage whose input is missing.
    """
    set_training(False)  # from here on, signals may unwind what is going on
    check_device(config)
    run_dir = Path(config.run_dir)
    resources = Resources(config)
    if config.export.push_to_hub and rank_zero_only.rank == 0:
        check_access(destination(config), of_target(resources.target_config))  # before the training, not after it
    chosen = [stage for stage in STAGES if stage in config.stages]
    for number, stage in enumerate(chosen, start=1):
        if rank_zero_only.rank and stage not in TRAINED:
            continue  # export and evaluation are the first rank's
        say(f"[{number}/{len(chosen)}] {stage}")
        _run_stage(config, stage, run_dir / stage, resources, later=chosen[number:])
    if rank_zero_only.rank == 0 and (run_dir / "records" / "export.done.json").exists():
        _describe_and_push(config, run_dir)


def _describe_and_push(config: DictConfig, run_dir: Path) -> None:
    """
    Raises:
        UserError: what was exported is not what the records speak of, or the Hub refused.
    """
    if is_outdated(run_dir):
        again = (
            f"{run_dir / 'export'}: trained again since it was exported. Run stages=[export,evaluate] overwrite=true"
        )
        if config.export.push_to_hub:
            raise UserError(f"{again} before it is pushed.")
        say(f"{again}; its model card is left as it is.")
        return
    write_card(run_dir)
    if config.export.push_to_hub:
        say(f"pushed to {push(run_dir / 'export', destination(config))}")


def _run_stage(config: DictConfig, stage: str, directory: Path, resources: Resources, later: list[str]) -> None:
    run_dir, overwrite = directory.parent, overwrites(config)
    record = StageRecord(run_dir, stage, _settings(config, stage, run_dir, resources))
    if not overwrite and record.finished():
        say(f"    finished before, see {directory}")
        if rank_zero_only.rank == 0:
            shutil.rmtree(directory / "checkpoints", ignore_errors=True)  # of a run killed when it had just finished
        return
    if stage in TRAINED:
        stages.checked_trainer(config, stage, directory)  # refused before the data is read
    resources.check(stage)
    if rank_zero_only.rank == 0:
        if overwrite:
            shutil.rmtree(directory, ignore_errors=True)
            if stage == "attention_tuning":
                shutil.rmtree(run_dir / stages.ADAPTER, ignore_errors=True)
            for name in later:  # a restart must not take them for done
                StageRecord(run_dir, name, {}).forget()
        record.begin(anew=overwrite)
    if stage in TRAINED:
        _barrier()  # the other ranks are gone by the time of export and evaluation
    seed_everything(config.seed, verbose=False)
    result = getattr(stages, stage)(config, directory, resources)
    if rank_zero_only.rank == 0:
        if "adapter" in result:
            say(f"    PEFT adapter: {result['adapter']}")
        record.finish(result, overrides=_overrides(), hardware=_hardware(config))
        # Only now: until the stage is on record, the checkpoints are what a restart goes on from.
        shutil.rmtree(directory / "checkpoints", ignore_errors=True)
        if stage in TRAINED:
            plot_losses({name: run_dir / name for name in TRAINED}, run_dir / "loss.png")


def _overrides() -> list[str]:
    """The command's arguments; none where there was no command."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def _hardware(config: DictConfig) -> str:
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return f"{ranks} x {device_name(torch.device(device(config)))}"


def _barrier() -> None:
    """All ranks, once an earlier stage has connected them."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def _settings(config: DictConfig, stage: str, run_dir: Path, resources: Resources) -> dict[str, Any]:
    """What the outcome of a stage depends on: its settings, and the content of the files that it starts from."""
    inputs = [run_dir / name for name in INPUTS[stage]]
    for file in inputs:
        if not file.exists():
            raise UserError(
                f"stages=[{stage}] starts from {file}, which is not there. Run stage {file.parent.name} first."
            )
    if stage == "export":
        inputs.append(stages.finished_weights(run_dir))
    if stage == "evaluate":
        inputs += sorted((run_dir / "export").glob("*.safetensors"))
    # Unresolved, so that a moved checkout keeps its settings.
    plain: Any = OmegaConf.to_container(config, resolve=False)
    written = {"dtype": plain["export"]["dtype"]}  # what else is there says where it goes
    if plain["export"]["complete"]:
        written["complete"] = True
    settings = {"model": plain["model"], "stage": written if stage == "export" else plain["stage"][stage]}
    if stage in TRAINED:
        settings["stage"] = {k: v for k, v in settings["stage"].items() if k not in WITHOUT_EFFECT}
        data = {k: v for k, v in plain["data"].items() if k not in ("prompts", "num_proc", "bad_records")}
        settings |= {"objective": plain["objective"], "data": data, "seed": plain["seed"]}
        if stage == "attention_tuning" and plain["adapter"]:
            settings["adapter"] = plain["adapter"]
        settings["arithmetic"] = arithmetic(config)  # ranks and strategy change no more than the rounding
    if stage == "evaluate":
        settings["template_kwargs"] = plain["data"]["template_kwargs"]
    inputs += _target_files(config)
    settings["inputs"] = {f"{f.parent.name}/{f.name}": file_sha256(f) for f in inputs if f.is_file()}
    if stage in TRAINED:
        settings["inputs"]["data"] = fingerprint(resources.parts)
    if stage == "evaluate":
        where = "cpu" if accelerator(config) == "cpu" else "gpu"
        settings |= {"seed": plain["seed"], "accelerator": where}  # speed is of a device
        settings["inputs"]["export/config.json"] = without_recommendation(run_dir / "export")
        given: Any = OmegaConf.to_container(config.benchmarks, resolve=True)
        settings["inputs"]["benchmarks"] = {name: benchmark_fingerprint(name, one) for name, one in given.items()}
    return settings


def _target_files(config: DictConfig) -> list[Path]:
    """Files of a local target; weights only up to a size that is hashed in a second."""
    if not config.model.target.name:
        return []
    files = sorted(Path(config.model.target.name).glob("*.json")) + sorted(
        Path(config.model.target.name).glob("*.safetensors")
    )
    return [file for file in files if file.stat().st_size < 2**30]
