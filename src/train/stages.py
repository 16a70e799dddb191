"""The four pipeline stages. Each writes its output to its own directory and returns a summary for the stage record."""

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from hydra.errors import HydraException
from hydra.utils import instantiate
from lightning import Trainer
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from torch import Tensor, nn

from data.errors import UserError
from models.artifact import CONFIG, DECODER, RECOMMENDATION
from models.attention.layers import Execution
from models.draft import DraftModel, start_from_head
from models.draft_config import DraftConfig
from models.export.artifact_io import export_draft, load_draft, load_draft_weights
from models.export.recommendation import recommend
from models.lora import LoraDraft, save_adapter
from train.checkpoint.checkpoints import check_final_weights, checkpointer
from train.context import Resources
from train.disk_space import ADAPTER, check_shared_memory
from train.endings.finite import callbacks_of, read_finite, skipped_steps
from train.endings.preemption import agreed_signal, set_training
from train.evaluate.acceptance import Variant
from train.evaluate.report import markdown, plot_acceptance, plot_speed, print_report
from train.evaluate.run import count_decoding, decoding_settings, evaluate_drafter
from train.loop.batches import BatchSettings
from train.loop.datamodule import DraftData
from train.loop.fit import build_trainer, fit, stage_monitor, wandb_loggers
from train.loop.validation_decoding import live_decoding
from train.run_dir.disk import disk_error, remove_tree, why_not_written
from train.run_dir.drafter_file import WEIGHTS, facts_of, finished_weights, save_drafter
from train.run_dir.state import publish, sync, write_json
from train.settings.derived import device
from train.terminal import say

CONTEXT = 256  # context length at which the FLOPs of drafting a block are recorded


def attention_tuning(config: DictConfig, directory: Path, resources: Resources) -> dict[str, Any]:
    """Stage 1: train the projectors of the draft layers and the mask embedding."""
    return _train(config, "attention_tuning", directory, resources)


def bonus_calibration(config: DictConfig, directory: Path, resources: Resources) -> dict[str, Any]:
    """Stage 2: train the calibrator on top of the stage 1 weights."""
    return _train(config, "bonus_calibration", directory, resources)


def export(config: DictConfig, directory: Path, resources: Resources) -> dict[str, Any]:
    """Export the trained drafter to the directory that inference loads."""
    source = finished_weights(directory.parent)
    draft = _new_draft(config, resources, calibrated=source.parent.name == "bonus_calibration")
    _load(draft.own_parameters(), source)
    dtype, complete = getattr(torch, config.export.dtype), config.export.complete
    try:
        _publish_directory(directory, lambda new: export_draft(draft, new, dtype, complete=complete))
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    flops = count_decoding(draft)
    result = {
        "parameters": sum(p.numel() for p in draft.own_parameters().values()),
        "calibrated": draft.config.calibrator_rank > 0,
        "block_flops": flops and flops.drafting(context=CONTEXT),
    }
    for logger in wandb_loggers(config, "export", directory):
        logger.log_directory(directory, result)
    return result


def evaluate(config: DictConfig, directory: Path, resources: Resources) -> dict[str, Any]:
    """Load the exported drafter and decode the benchmarks with it.

    Raises:
        UserError: the export cannot be loaded, or decoding is not lossless (see `Evaluation.broken`).
    """
    settings, exported = config.stage.evaluate, directory.parent / "export"
    target = cast(Any, resources.target).to(device(config))  # transformers' type hints reject a string
    try:
        draft = load_draft(exported, target).to(target.device)
    except ValueError as error:
        raise UserError(f"{exported}: failed to load the exported drafter. {error}") from error
    variants = _variants(draft, list(settings.variants))
    evaluation = evaluate_drafter(
        target,
        variants,
        resources.benchmarks,
        resources.encoder,
        decoding_settings(config, resources.tokenizer),
        cast(dict[str, Any], OmegaConf.to_container(settings.speed, resolve=True)),
        name=resources.name or "random weights",
    )
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "report.json", evaluation.as_dict())
    publish(directory / "report.md", lambda file: file.write_text(markdown(evaluation, config.name), encoding="utf-8"))
    plot_acceptance(evaluation, directory.parent / "acceptance_by_slot.png")
    if evaluation.speed:
        plot_speed(evaluation.speed, directory / "speed.png")
    print_report(evaluation, directory.parent)
    if broken := evaluation.broken():
        raise UserError(
            f"Decoding with the drafter did not reproduce the target's output in {evaluation.dtype}: {broken} "
            "This is a bug, or the architecture is unsupported. "
            f"See {directory / 'report.json'} for all differences."
        )
    recommend(exported, evaluation.speed.recommended if evaluation.speed and set(variants) != {"untuned"} else None)
    for logger in wandb_loggers(config, "evaluate", directory):
        logger.log_summary(evaluation.summary())
    together = evaluation.together.variants
    figures = ("tau", "low", "high", "verify_steps")
    return {name: {figure: getattr(found, figure) for figure in figures} for name, found in together.items()}


def _variants(draft: DraftModel, chosen: list[str]) -> dict[str, Variant]:
    """Return the chosen variants, keyed by name and ordered from untrained to fully trained.

    Raises:
        UserError: the exported drafter has none of the chosen variants.
    """
    untuned = DraftModel(draft.target, draft.config.without_extras().uncalibrated())
    # With a bonus slot, sequential and parallel mode produce different drafts, so the mode must not change during
    # decoding. Without one, `auto` may switch between them.
    mode = "sequential" if draft.bonus_slot else "auto"
    known = {"untuned": Variant(untuned, calibrate=False), "attention_tuned": Variant(draft, False, mode)}
    if draft.config.calibrator_rank:
        if draft.bonus_slot:
            known["calibrated_parallel"] = Variant(draft, True, "parallel")
        known["calibrated"] = Variant(draft, True, mode)
    if not known.keys() & set(chosen):
        raise UserError(
            f"stage.evaluate.variants={chosen}: the exported drafter has none of these. Choose from {', '.join(known)}."
        )
    return {name: variant for name, variant in known.items() if name in chosen}  # ordered as in `known`


def checked_trainer(config: DictConfig, stage: str, directory: Path) -> Trainer:
    """Build the trainer for a training stage.

    Raises:
        UserError: the trainer preset cannot be used on this machine, the global batch size is not divisible by the
            number of ranks, or the objective is invalid.
    """
    try:
        instantiate(config.objective)
    except HydraException as error:
        raise UserError(f"objective: {error.__cause__ or error} Presets: conf/objective/.") from error
    try:
        trainer = build_trainer(config, stage, directory)
    except UserError:
        raise
    except (HydraException, RuntimeError) as error:  # Lightning raises RuntimeError for inconsistent SLURM variables
        raise UserError(
            f"trainer, logger or callbacks: {error.__cause__ or error} Presets: conf/trainer/, e.g. trainer=cpu."
        ) from error
    except ValueError as error:
        raise UserError(f"stage.{stage}.{error}") from error
    return trainer


def _train(config: DictConfig, stage: str, directory: Path, resources: Resources) -> dict[str, Any]:
    settings = config.stage[stage]
    trainer = checked_trainer(config, stage, directory)
    calibrates = stage == "bonus_calibration"
    draft = untrained(config, stage, resources)
    if calibrates:
        source = directory.parent / "attention_tuning" / WEIGHTS
        _load(draft.attention_parameters(), source)
        start_from_head(draft)
    training, validation = resources.rows
    if settings.best_by and not len(validation):
        say("    data.validation_records=0 disables validation, so the stage keeps the last weights, not the best")
    data = DraftData(training, validation, BatchSettings.of_stage(config, stage), workers=config.runtime.workers)
    check_shared_memory(config.runtime.workers, data.batch_bytes(trainer.world_size) if config.runtime.workers else 0)
    module = instantiate(settings.module)(resources.target, draft, execution=_execution(config, trainer))
    plain: Any = OmegaConf.to_container(config, resolve=True)
    for logger in trainer.loggers:
        logger.log_hyperparams(plain)
    callbacks = callbacks_of(trainer)
    callbacks += live_decoding(config, stage, validation, resources.positions, resources.tokenizer)
    # First in the list, so that its metrics are on disk before a checkpoint marks the step as done.
    callbacks.insert(0, stage_monitor(config, stage, resources.target_config, training))
    metrics = fit(trainer, module, data, directory)
    trained = trainer.strategy.lightning_module_state_dict()  # on every rank: a collective operation under ZeRO 3
    check_final_weights(trainer, trained)
    if trainer.is_global_zero:
        own = read_finite(source) if calibrates else {}
        own |= {name: tensor.cpu() for name, tensor in trained.items()}
        own |= checkpointer(trainer).best_weights()
        if not calibrates:
            own = _merged(draft, own, directory.with_name(ADAPTER))
        save_drafter(directory / WEIGHTS, own, facts_of(config, resources.target_identity, calibrated=calibrates))
    trainer.strategy.barrier()  # the next stage reads the file on every rank
    set_training(False, agreed_signal(trainer.strategy))
    if any(hasattr(p, "ds_id") for p in resources.target.parameters()):
        resources.forget_target()
    parameters = sum(tensor.numel() for tensor in trained.values())
    steps = trainer.global_step  # fewer than configured after early stopping
    weights_of_step = checkpointer(trainer).best.get("step", steps)
    result = {"trained_parameters": parameters, "steps": steps, "weights_of_step": weights_of_step, **metrics}
    if skipped := skipped_steps(trainer):
        result["skipped_steps"] = skipped
    if isinstance(draft, LoraDraft):
        result["adapter"] = str(directory.with_name(ADAPTER))
    return result


def _load(own: dict[str, nn.Parameter], source: Path) -> None:
    """Load trained weights from `source` into the given parameters.

    Raises:
        UserError: the file is damaged or belongs to a different drafter.
    """
    tensors = read_finite(source)
    try:
        load_draft_weights(own, tensors, source=str(source))
    except ValueError as error:
        raise UserError(str(error)) from error


def result_files(stage: str, directory: Path) -> list[Path]:
    """Return the result files of a finished stage, which never change afterwards."""
    if stage == "evaluate":
        recommendation = sorted(directory.with_name("export").glob(RECOMMENDATION))
        return [directory / "report.json", directory / "report.md", *recommendation]
    if stage == "export":
        return [*sorted(directory.glob("*.safetensors")), directory / CONFIG, directory / DECODER]
    adapter = sorted(directory.with_name(ADAPTER).glob("*")) if stage == "attention_tuning" else []
    return [directory / WEIGHTS, *adapter]


def _merged(draft: DraftModel, trained: dict[str, Tensor], directory: Path) -> dict[str, Tensor]:
    """Return the stage 1 weights, keyed by exported name. With LoRA, save the adapter to `directory` and merge it."""
    if not isinstance(draft, LoraDraft):
        remove_tree(directory)  # left by an earlier run of this stage that used an adapter
        return trained
    load_draft_weights(draft.attention_parameters(), trained, source="the trained weights")
    _publish_directory(directory, lambda new: save_adapter(draft, new))
    return {name: p.detach().cpu() for name, p in draft.merged().own_parameters().items()}


def _publish_directory(directory: Path, write: Callable[[Path], Any]) -> None:
    """Write a directory under a temporary name, sync it and rename it. File modes follow the umask.

    Raises:
        DiskError: the disk is full or not writable, or the previous directory cannot be deleted.
    """
    temporary = directory.with_name(f"{directory.name}.new")
    remove_tree(temporary)
    try:
        write(temporary)
        plain = temporary / ".mode"
        plain.touch()
        mode = stat.S_IMODE(plain.stat().st_mode)
        plain.unlink()
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(mode)
            sync(file)
    except (OSError, SafetensorError) as error:
        reason = why_not_written(temporary / ".probe", error)
        shutil.rmtree(temporary, ignore_errors=True)  # free the space used by an incomplete export
        if isinstance(reason, OSError):
            raise disk_error(reason, directory) from error
        raise
    remove_tree(directory)
    os.replace(temporary, directory)


def _execution(config: DictConfig, trainer: Trainer) -> Execution:
    """Return the execution settings for the decoder layers."""
    runtime = config.runtime
    # ZeRO 3 gathers the weights of each layer in a forward hook, which a compiled graph cannot contain.
    sharded = getattr(trainer.strategy, "zero_stage_3", False)
    return Execution(
        attention=runtime.attention,
        compile=runtime.compile and not sharded,
        activation_checkpointing=runtime.activation_checkpointing,
    )


def untrained(config: DictConfig, stage: str, resources: Resources) -> DraftModel | LoraDraft:
    """Build the drafter for a training stage without loading trained weights.

    Raises:
        UserError: the target cannot be loaded, or the adapter does not fit it.
    """
    calibrates = stage == "bonus_calibration"
    return _new_draft(config, resources, calibrated=calibrates, adapted=not calibrates)


def _new_draft(
    config: DictConfig, resources: Resources, *, calibrated: bool, adapted: bool = False
) -> DraftModel | LoraDraft:
    """Build an untrained drafter with master weights in float32, or in the target's dtype if that is wider.

    Args:
        adapted: apply the configured adapter, if any.

    Raises:
        UserError: the adapter does not fit this architecture.
    """
    target, draft = resources.target, DraftConfig(**config.model.draft)
    dtype = torch.promote_types(torch.float32, target.dtype)
    if adapted and config.adapter:
        try:
            return LoraDraft(target, instantiate(config.adapter), draft, dtype=dtype)
        except ValueError as error:
            raise UserError(f"adapter.{error}") from error
    return DraftModel(target, draft if calibrated else draft.uncalibrated(), dtype=dtype)
