"""Identity of a stage: the settings and file contents that determine its outcome.

Each run directory holds a single outcome. Settings that affect only memory, speed or paths are not part of the
identity, so a run can still be resumed after fixing an out-of-memory error or moving a file. Together, `CHANGES` and
`WITHOUT_EFFECT` list every setting in conf/ exactly once (enforced by tests/train/test_identity.py). To be safe,
unlisted settings are treated as part of the identity.
"""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from data.errors import UserError
from data.sources.benchmarks import benchmark_fingerprint
from data.sources.readers import fingerprint
from models.artifact import read_config
from models.draft_config import KINDS, OPTIONAL
from train.context import Resources
from train.names import STAGES, TRAINED
from train.run_dir.drafter_file import WEIGHTS, finished_weights, target_then
from train.run_dir.state import check_written, file_sha256
from train.run_dir.target_files import comparable, short
from train.settings.derived import accelerator, arithmetic

TUNING, CALIBRATION, EXPORT, EVALUATE = STAGES

# Required input files of each stage, written by earlier stages.
INPUTS = {
    TUNING: [],
    CALIBRATION: [f"{TUNING}/{WEIGHTS}"],
    EXPORT: [],  # stage 2 weights if that stage is finished, else stage 1 weights (`drafter_file.finished_weights`)
    EVALUATE: ["export/config.json"],
}

TRAINING: tuple[str, ...] = (
    "module._target_",
    "module._partial_",
    "module.objective",
    "module.slot0_loss",
    "module.learning_rate",
)
TRAINING += ("module.weight_decay", "module.betas", "module.eps", "module.warmup_ratio", "module.min_lr_ratio")
TRAINING += ("module.steps", "module.bonus_slot_fraction", "module.joint", "steps", "global_batch_size", "num_anchors")
TRAINING += ("gradient_clip", "validate_every", "decode.prompts", "decode.max_new_tokens", "best_by", "patience")
MEASURED: tuple[str, ...] = (
    "num_prompts",
    "max_new_tokens",
    "variants",
    "selection",
    "threshold",
    "temperature",
    "top_k",
    "top_p",
)
MEASURED += ("speed.num_prompts", "speed.batch_sizes", "speed.thresholds", "speed.repeats")
# Maps each setting to the stages whose outcome it changes. A name covers all settings below it; the longest match wins.
CHANGES: dict[str, tuple[str, ...]] = {
    "seed": (*TRAINED, EVALUATE),
    "data.truncation": TRAINED,
    "data.max_seq_len": TRAINED,
    "data.validation_records": TRAINED,
    "data.template_kwargs": (*TRAINED, EVALUATE),
    "model.target.dtype": (*TRAINED, EVALUATE),
    # Export and evaluation check the drafter's settings against the trained drafter.
    **{f"model.draft.{key}": TRAINED for key in KINDS},
    **{f"model.draft.{part.key}": (CALIBRATION,) for part, _ in OPTIONAL if part.stage == CALIBRATION},
    "adapter": (TUNING,),
    "objective": TRAINED,
    "trainer.precision": TRAINED,
    "trainer.accelerator": (EVALUATE,),  # speed depends on the device
    "export.dtype": (EXPORT,),
    "export.complete": (EXPORT,),
    **{f"stage.{stage}.{key}": (stage,) for stage in TRAINED for key in TRAINING},
    **{f"stage.{EVALUATE}.{key}": (EVALUATE,) for key in MEASURED},
}
CONTENT, MEMORY, ROUNDING = "identified by content", "memory and speed", "the same up to rounding"
COMMAND, PLACE, LOGS = (
    "selects what a command does, or is read by a different command",
    "location of the results",
    "what is logged or saved, and how often",
)
# Maps each setting to the reason why no outcome depends on it.
WITHOUT_EFFECT = {
    **dict.fromkeys(("name", "run_dir", "export.push_to_hub", "export.private", "export.tag"), PLACE),
    **dict.fromkeys(("stages", "overwrite", "plan", "hydra", "hardware", "regenerate"), COMMAND),
    **dict.fromkeys(("data.path", "data.split", "data.max_records", "data.bad_records"), CONTENT),
    **dict.fromkeys(("data.prompts", "benchmarks"), CONTENT),
    **dict.fromkeys(("model.target.name", "model.target.revision", "model.target.tokenizer"), CONTENT),
    "model.target.architecture": "identifies a target with random weights; otherwise checked against the target",
    **dict.fromkeys(("data.num_proc", "runtime.workers", "runtime.activation_checkpointing"), MEMORY),
    **dict.fromkeys(("runtime.attention", "runtime.compile"), ROUNDING),
    **dict.fromkeys(("logger", "callbacks.progress"), LOGS),
    **{f"stage.{s}.{k}": LOGS for s in TRAINED for k in ("checkpoint_every", "keep_checkpoints")},
    **{f"stage.{s}.max_skipped_steps": "when a diverged run stops" for s in TRAINED},
    **{f"stage.{s}.{k}": MEMORY for s in TRAINED for k in ("micro_batch_size", "module.chunk", "decode.batch_size")},
    f"stage.{EVALUATE}.batch_size": MEMORY,
    **{f"trainer.{k}": ROUNDING for k in ("_target_", "devices", "num_nodes", "strategy", "deterministic")},
    **{f"trainer.{k}": ROUNDING for k in ("benchmark", "sync_batchnorm")},
    **{f"trainer.{k}": LOGS for k in ("profiler", "detect_anomaly", "log_every_n_steps", "max_time", "barebones")},
    **{f"trainer.enable_{k}": LOGS for k in ("progress_bar", "checkpointing", "model_summary", "autolog_hparams")},
}
# Lightning callbacks that only observe training. Other callbacks may change the weights, so their settings are part of
# the identity.
OBSERVERS: tuple[str, ...] = (
    "TQDMProgressBar",
    "RichProgressBar",
    "DeviceStatsMonitor",
    "LearningRateMonitor",
    "ModelCheckpoint",
)
OBSERVERS += ("ModelSummary", "RichModelSummary", "Timer", "ThroughputMonitor", "OnExceptionCheckpoint")


def rule(setting: str) -> tuple[str, ...] | str | None:
    """Return the stages whose outcome a setting changes, or the reason why it changes none; None if unclassified."""
    parts = setting.split(".")
    for end in range(len(parts), 0, -1):
        name = ".".join(parts[:end])
        if name in CHANGES or name in WITHOUT_EFFECT:
            return CHANGES.get(name, WITHOUT_EFFECT.get(name))
    return None


def counts(key: str, stage: str) -> bool:
    """Return whether an entry in a stage's record, e.g. `stage.steps`, is part of the stage's identity."""
    if key.startswith("inputs."):
        return True
    if key.startswith("stage."):
        key = key.replace("stage", EXPORT if stage == EXPORT else f"stage.{stage}", 1)
    shorter = {"arithmetic": "trainer.precision", "accelerator": "trainer.accelerator"}
    found = rule(shorter.get(key, f"data.{key}" if key.startswith("template_kwargs") else key))
    return found is None or stage in found if not isinstance(found, str) else False


def settings_of(config: DictConfig, stage: str, run_dir: Path, resources: Resources) -> dict[str, Any]:
    """Return the settings and input hashes to store in a stage's record.

    Raises:
        UserError: an input file is not the one that an earlier stage wrote.
    """
    plain: Any = {group: OmegaConf.to_container(config[group], resolve=True) for group in _groups(stage)}
    settings = {"model": plain["model"], "stage": plain["stage"].get(stage)}
    if stage == EXPORT:
        written: Any = OmegaConf.to_container(config.export)
        settings["stage"] = {"dtype": written["dtype"]} | ({"complete": True} if written["complete"] else {})
    if stage in TRAINED:
        settings |= {"objective": plain["objective"], "data": plain["data"], "seed": config.seed}
        settings |= {"arithmetic": arithmetic(config), "trainer": _beyond_presets(plain["trainer"])}
        _without_references(settings)
        changing = {k: v for k, v in plain["callbacks"].items() if not _observes(v)}
        settings |= {"callbacks": changing} if changing else {}
        if stage == TUNING and plain["adapter"]:
            settings["adapter"] = plain["adapter"]
    if stage == EVALUATE:
        settings |= {"template_kwargs": plain["data"]["template_kwargs"], "seed": config.seed}
        settings["accelerator"] = "cpu" if accelerator(config) == "cpu" else "gpu"
    settings["inputs"] = _inputs(config, stage, run_dir, resources)
    return settings


def _groups(stage: str) -> tuple[str, ...]:
    return ("model", "stage", "data", *(("objective", "trainer", "callbacks", "adapter") if stage in TRAINED else ()))


def _without_references(settings: dict[str, Any]) -> None:
    """Remove `objective` and `steps` from the module settings: conf/ duplicates them there by reference."""
    module = settings["stage"]["module"]
    for key, given in (("objective", settings["objective"]), ("steps", settings["stage"]["steps"])):
        if module.get(key) == given or isinstance(module.get(key), str):
            module.pop(key)


def _beyond_presets(trainer: dict[str, Any]) -> dict[str, Any]:
    """Return the Trainer arguments that may change the outcome, except those recorded separately."""
    known = {"precision", "accelerator"}  # recorded separately
    return {key: value for key, value in trainer.items() if key not in known and counts(f"trainer.{key}", TUNING)}


def _observes(callback: Any) -> bool:
    return isinstance(callback, dict) and str(callback.get("_target_")).rsplit(".", 1)[-1] in OBSERVERS


def check_inputs(stage: str, run_dir: Path) -> None:
    """Check that the input files of a stage exist.

    Raises:
        UserError: an input file is missing.
    """
    for name in INPUTS[stage]:
        if not (run_dir / name).exists():
            before = name.split("/")[0]
            raise UserError(f"stages=[{stage}] needs {run_dir / name}, which is missing. Run stage {before} first.")


def _inputs(config: DictConfig, stage: str, run_dir: Path, resources: Resources) -> dict[str, Any]:
    files = [run_dir / name for name in INPUTS[stage] if name.endswith(WEIGHTS)]
    if stage == EXPORT:
        files.append(finished_weights(run_dir))
    if stage == EVALUATE:
        files += sorted((run_dir / "export").glob("*.safetensors"))
    inputs: dict[str, Any] = {f"{file.parent.name}/{file.name}": file_sha256(file) for file in files}
    check_written(run_dir, inputs)
    inputs["target"] = resources.target_identity
    if stage in TRAINED:
        inputs["data"] = fingerprint(resources.sources)
    if stage == EVALUATE:
        inputs["export/config.json"] = read_config(run_dir / "export")
        given: Any = OmegaConf.to_container(config.benchmarks, resolve=True)
        inputs["benchmarks"] = {name: benchmark_fingerprint(name, one) for name, one in given.items()}
    return inputs


def differences(old: dict[str, Any], new: dict[str, Any], stage: str) -> list[str]:
    """Return `key: old -> new` for each differing entry of two records that affects the stage's outcome."""
    old = _with_absent_parts(_of_this_version(old, new))
    target = comparable(old["inputs"]["target"], new["inputs"]["target"])
    found = _differences(old | {"inputs": old["inputs"] | {"target": target}}, new)
    return [f"{key}: {_short(a)} -> {_short(b)}" for key, a, b in found if counts(key, stage)]


def _of_this_version(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Convert a record from an earlier version, which stored the hashes of the target's files by directory and name."""
    inputs = old.get("inputs", {})
    if "target" in inputs:
        return old
    target = target_then(old, new["inputs"]["target"])
    ours = tuple(f"{stage}/" for stage in STAGES)
    kept = {key: value for key, value in inputs.items() if "/" not in key or key.startswith(ours)}
    module = old.get("stage", {}).get("module")
    if module:  # earlier versions stored unresolved references
        plain = {key: v for key, v in module.items() if not (isinstance(v, str) and v.startswith("${"))}
        old = old | {"stage": old["stage"] | {"module": plain}}
    return old | {"inputs": kept | {"target": target}}


def _with_absent_parts(old: dict[str, Any]) -> dict[str, Any]:
    """Add drafter parts that were introduced after the record was written, marked as disabled."""
    model = old.get("model") or {}
    if not model.get("draft"):
        return old
    draft = {part.key: off for part, off in OPTIONAL} | model["draft"]
    return old | {"model": model | {"draft": draft}}


def _differences(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Return (path, old, new) for each differing leaf of two nested dicts."""
    if isinstance(old, dict | None) and isinstance(new, dict | None) and not (old is None and new is None):
        old, new = old or {}, new or {}
        keys = sorted(old.keys() | new.keys())
        return [d for key in keys for d in _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)]
    same = _own_class(old) == _own_class(new) if path.endswith("_target_") else old == new
    return [] if same else [(path, old, new)]


def _own_class(target: Any) -> Any:
    """Reduce a class path of this project to the class name, because classes move between modules across versions."""
    ours = isinstance(target, str) and target.startswith(("train.", "models."))
    return target.rsplit(".", 1)[-1] if ours else target


def _short(value: Any) -> str:
    """Format a value, with hashes shortened to 12 digits."""
    return f"[{', '.join(map(_short, value))}]" if isinstance(value, list) else short(value)
