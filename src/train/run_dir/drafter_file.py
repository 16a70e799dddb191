"""`draft.safetensors`: drafter weights after a training stage, with the training setup in the metadata."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.errors import UserError
from models.artifact import CONFIG
from models.draft_config import KINDS, DraftConfig
from train.run_dir.state import file_sha256, publish, read_record
from train.run_dir.target_files import comparable, short

WEIGHTS = "draft.safetensors"  # float32, with the parameter names of the export
FACTS = "flexdraft"  # the only metadata key, since safetensors writes multiple keys in random order


def facts_of(config: DictConfig, target: dict[str, Any], *, calibrated: bool) -> dict[str, Any]:
    """Return a drafter's training setup: its sizes, the target's identity and the chat template arguments.

    Args:
        target: `Resources.target_identity`.
        calibrated: whether the drafter has finished stage 2; otherwise, the parts trained there are recorded as absent.
    """
    draft = DraftConfig(**config.model.draft)
    template = OmegaConf.to_container(config.data.template_kwargs, resolve=True)
    known = {"template_kwargs": template, "target": target}
    return asdict(draft if calibrated else draft.uncalibrated()) | known


def save_drafter(file: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write the drafter file. Equal tensors and facts produce identical bytes.

    Raises:
        DiskError: the file cannot be written, e.g. because the disk is full or read-only.
    """
    metadata = {FACTS: json.dumps(facts, sort_keys=True)}
    needed = sum(tensor.nbytes for tensor in tensors.values())
    publish(file, lambda temporary: save_file(tensors, temporary, metadata=metadata), needed=needed)


def finished_weights(run_dir: Path) -> Path:
    """Return the drafter file to export: the calibrated one if stage 2 is finished, else the attention-tuned one.

    Raises:
        UserError: neither stage is finished, the result of stage 2 is missing, or stage 2 started from a different
            attention-tuning result than the current one.
    """
    tuned, calibrated = (run_dir / stage / WEIGHTS for stage in ("attention_tuning", "bonus_calibration"))
    done = read_record(run_dir / "records" / "bonus_calibration.done.json")
    if done is not None:
        _check_present(calibrated)
        before = done.get("settings", {}).get("inputs", {}).get(f"attention_tuning/{WEIGHTS}")
        if before and tuned.exists() and file_sha256(tuned) != before:
            raise UserError(
                f"{calibrated} was trained from a different version of {tuned}. "
                "Rerun with overwrite=[bonus_calibration,export,evaluate]."
            )
        return calibrated
    if (run_dir / "records" / "attention_tuning.done.json").exists():
        _check_present(tuned)
        return tuned
    raise UserError(
        f"{run_dir} contains no trained drafter. Run with stages=[attention_tuning,bonus_calibration] first."
    )


def _check_present(weights: Path) -> None:
    stage = weights.parent.name
    if not weights.exists():
        raise UserError(
            f"{weights} is missing, but stage {stage} is recorded as finished. Restore the file, or retrain with "
            f"overwrite={stage}."
        )


def facts_in(file: Path, now: dict[str, Any]) -> dict[str, Any]:
    """Read the training setup of a `draft.safetensors`.

    The setup is stored in the file's metadata or, for files written by earlier versions, in the stage record.

    Args:
        now: `Resources.target_identity`, which completes records written by earlier versions.

    Raises:
        UserError: the file is damaged, or neither its metadata nor the stage record contains the setup.
    """
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged: not a valid safetensors file ({error}).") from error
    if FACTS in metadata:
        return json.loads(metadata[FACTS])
    stage = file.parent.name
    settings = (read_record(file.parents[1] / "records" / f"{stage}.done.json") or {}).get("settings")
    if not settings:
        raise UserError(
            f"{file} was written by an earlier version, which did not store the training setup in it, and this run "
            f"directory has no readable record of {stage}. Use the file in its original run directory, or retrain with "
            f"overwrite={stage}."
        )
    recorded = settings["model"]["draft"]
    draft = DraftConfig(**{"calibrator_rank": 0} | {key: recorded[key] for key in KINDS if key in recorded})
    known = {"template_kwargs": settings["data"]["template_kwargs"], "target": target_then(settings, now)}
    return asdict(draft if stage == "bonus_calibration" else draft.uncalibrated()) | known


def facts_of_export(run_dir: Path, now: dict[str, Any]) -> dict[str, Any]:
    """Read an exported drafter's sizes from its config.json, and its training setup from the export record.

    Args:
        now: `Resources.target_identity`, which completes records written by earlier versions.

    Raises:
        UserError: config.json is not the config of an exported drafter.
    """
    exported = run_dir / "export"
    try:
        draft = DraftConfig.from_artifact(json.loads((exported / CONFIG).read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{exported / CONFIG}: not the config of an exported drafter ({error!r}). Run with overwrite=export."
        ) from error
    record = read_record(run_dir / "records" / "export.done.json") or {}
    facts = record.get("drafter") or {}
    source = next(
        (run_dir / name for name in record.get("settings", {}).get("inputs", {}) if name.endswith(WEIGHTS)), None
    )
    if not facts and source is not None and source.exists():  # exported by an earlier version
        facts = facts_in(source, now)
    return facts | asdict(draft)


def check_fits(source: Path, facts: dict[str, Any], config: DictConfig, target: dict[str, Any], stage: str) -> None:
    """Check that a stage's settings match the drafter it starts from.

    Args:
        source: the drafter file, named in error messages.
        facts: training setup of `source`.
        target: `Resources.target_identity` of the settings.

    Raises:
        UserError: drafter sizes, target or chat template arguments differ. The message gives both values.
    """
    asked = facts_of(config, target, calibrated=facts["calibrator_rank"] > 0)
    # Facts from earlier versions may lack the template arguments, and parts that did not exist yet.
    compared = asked.keys() - {"target"} - ({"template_kwargs"} - facts.keys())
    wrong = [key for key in asked if key in compared and facts.get(key, 0) != asked[key]]
    group = lambda key: f"data.{key}" if key == "template_kwargs" else f"model.draft.{key}"  # noqa: E731
    if wrong:
        trained, given = (
            " ".join(f"{group(key)}={_written(of.get(key, 0))}" for key in wrong) for of in (facts, asked)
        )
        raise UserError(
            f"{source} was trained with {trained}, but stage {stage} is configured with {given}. "
            f"Set {trained}, or train a new drafter under a different name=..."
        )
    then = comparable(facts.get("target", target), target)
    changed = [key for key in sorted(then.keys() | target.keys()) if then.get(key) != target.get(key)]
    if changed:
        pairs = "; ".join(f"{key}: {short(then.get(key))} -> {short(target.get(key))}" for key in changed)
        raise UserError(
            f"{source} was trained for a different target than model.target.name={config.model.target.name} ({pairs}). "
            "Set the target it was trained for, or train a new drafter under a different name=..."
        )


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def target_then(settings: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return the target's identity at the time a stage record was written.

    Earlier versions stored hashes of the target's .json files under the target's directory name. Entries missing from
    such a record are assumed to be unchanged and taken from `now`.

    Args:
        settings: settings in the stage record.
        now: the current `Resources.target_identity`.
    """
    inputs = settings.get("inputs", {})
    if "target" in inputs:
        return inputs["target"]
    ours = ("attention_tuning/", "bonus_calibration/", "export/", "evaluate/")
    known = {key.split("/")[-1]: v for key, v in inputs.items() if "/" in key and not key.startswith(ours)}
    target = settings.get("model", {}).get("target", {})
    if not known and target.get("name"):
        return {"repository": target["name"]} | ({"commit": target["revision"]} if target.get("revision") else {})
    if not known:
        known = {"architecture": target.get("architecture")}
    return {key: known.get(key, value) for key, value in now.items()} if known.keys() & now.keys() else known
