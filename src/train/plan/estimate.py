"""Estimate memory, FLOPs and time of a training stage on the machine given in the settings."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from huggingface_hub import try_to_load_from_cache
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from data.config.compose import preset
from data.errors import UserError
from models.artifact import read_object, why_no_object
from models.cost.activation_memory import Setup
from models.cost.flops import step_flops
from models.cost.hardware import GIB, GPUS, peak_flops
from models.cost.memory import FLOAT32, decoding_memory, peak, step_memory
from models.cost.sizes import FAMILIES, Sizes
from models.readable import CONFIG_FILES, reading
from train.names import TRAINED
from train.settings.checks import check_path, check_ranks, check_sizes
from train.settings.derived import accelerator, arithmetic, device_count, micro_batches_per_step

# Assumed, not measured: GPU memory used by CUDA, its libraries and communication; host memory used by Python and its
# libraries.
CONTEXT, LIBRARIES = 1 * GIB, 1 * GIB
USABLE = 0.95  # usable fraction of the memory; the rest is lost to fragmentation
DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Machine:
    """Hardware of a run."""

    gpu: str | None  # name in `models.cost.hardware.GPUS`; None: this machine's CPU
    ranks: int
    per_node: int
    memory: float  # bytes for one rank
    flops: float  # peak FLOP/s of one rank

    @property
    def name(self) -> str:
        return f"{self.ranks} x {self.gpu or 'CPU'}"


@dataclass(frozen=True)
class Estimate:
    """Estimated cost of one training stage."""

    stage: str
    steps: int
    setup: Setup
    flops: dict[str, float]  # per step and rank, by part
    seconds: float  # per step
    phase: str  # the phase with the highest memory use
    parts: dict[str, float]  # bytes per rank in that phase
    limit: float  # bytes available to one rank

    @property
    def bytes(self) -> float:
        """Peak memory of one rank."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.bytes <= self.limit


def target_sizes(config: DictConfig) -> Sizes:
    """Return the sizes of target and drafter without network access.

    Raises:
        UserError: the sizes are unknown, the plan does not support the architecture, the drafter has too many layers,
            rows are too long, or the adapter names projectors that do not exist.
    """
    target, draft = config.model.target, config.model.draft
    try:
        sizes = Sizes.from_config(_completed(_architecture(target), target.name), **draft_shape(config))
    except ValueError as error:
        raise UserError(f"model.target: the plan cannot count this target: {error}") from error
    if sizes.draft_layers > sizes.layers:
        raise UserError(f"model.draft.num_layers={sizes.draft_layers}, but the target has {sizes.layers} layers.")
    longest = config.data.max_seq_len + draft.block_size
    if longest > sizes.positions:
        raise UserError(
            f"data.max_seq_len + model.draft.block_size = {longest} exceeds the target's {sizes.positions} positions."
        )
    check_ranks(config, SimpleNamespace(vocab_size=sizes.vocabulary, hidden_size=sizes.hidden))
    if not config.adapter:
        return sizes
    try:
        return sizes.with_lora(config.adapter.rank, config.adapter.target_modules)
    except ValueError as error:
        raise UserError(str(error)) from error


def draft_shape(config: DictConfig) -> dict[str, Any]:
    """Return the drafter's sizes and whether it is trained jointly, as arguments of `Sizes.from_config`."""
    return {**config.model.draft, "joint": config.stage.bonus_calibration.module.joint}


def disk_parts(config: DictConfig, sizes: Sizes, stages: list[str]) -> dict[str, int]:
    """Return the disk usage of the run directory in bytes, by part.

    The checkpoints of a stage are deleted when it finishes, so only the largest set counts.
    """
    trained = [stage for stage in TRAINED if stage in stages]
    last = TRAINED[1] if TRAINED[1] in config.stages else TRAINED[0]
    # One more than `keep_checkpoints`: a new checkpoint is written before the oldest is deleted.
    checkpoints = [(config.stage[s].keep_checkpoints + 1) * _checkpoint(sizes, s) for s in trained]
    exported = DTYPE_BYTES[config.export.dtype] * sizes.draft_parameters(last)
    return {
        "checkpoints of a stage": max(checkpoints, default=0),
        "trained drafters": FLOAT32 * sum(sizes.draft_parameters(stage) for stage in trained),
        "export": exported if "export" in stages else 0,
    }


def _checkpoint(sizes: Sizes, stage: str) -> int:
    """Bytes of one checkpoint: weights, two optimizer moments, and the best weights that it may refer to."""
    return (3 + 1) * FLOAT32 * sizes.trained_parameters(stage)


def _architecture(target: DictConfig) -> dict[str, Any]:
    """Return the target's config.json if it is on this machine, otherwise `model.target.architecture`.

    Raises:
        UserError: neither exists, config.json is damaged, they differ, or the architecture belongs to another target.
    """
    given: Any = OmegaConf.to_container(target.architecture, resolve=True) if target.architecture else None
    if target.name is None and given is None:
        raise UserError("model.target: give a name, or an architecture for random weights.")
    if target.name is None:
        return given
    check_path(target.name)
    if file := _config_file(target):
        if reason := why_no_object(file, "Copy or download it again."):
            raise UserError(f"model.target.name={target.name}: {reason}")
        found = read_object(file)
        check_sizes(given or {}, {key: found.get(key, value) for key, value in (given or {}).items()})
        return found
    if given is None:
        raise UserError(
            f"model.target.name={target.name}: its config.json would have to be downloaded, and the plan downloads "
            "nothing. Give the sizes in model.target.architecture, as conf/model/qwen3_8b.yaml does."
        )
    if (preset := _preset_name()) not in (None, target.name):
        raise UserError(
            f"model.target.name={target.name}, but model.target.architecture has the sizes of {preset}. "
            "Choose model=custom, and give the sizes there if the target is not on this machine."
        )
    return given


def _config_file(target: DictConfig) -> Path | None:
    """Return the path of the target's config.json in its directory or the Hub cache; None if it is in neither."""
    file = Path(target.name, "config.json")
    if file.exists():
        return file
    cached = try_to_load_from_cache(target.name, "config.json", revision=target.revision)
    return Path(cached) if isinstance(cached, str) else None


def _preset_name() -> str | None:
    """Return the name of the target that the chosen file of conf/model/ describes."""
    chosen = HydraConfig.get().runtime.choices.get("model") if HydraConfig.initialized() else None
    return preset("model", chosen).target.get("name") if chosen else None


def _completed(architecture: dict[str, Any], name: str | None) -> dict[str, Any]:
    """Fill in the defaults of the architecture's config, such as which layers use a sliding window."""
    if architecture.get("model_type") not in FAMILIES:
        return architecture  # `Sizes` reports the error
    from transformers import AutoConfig  # deferred: nothing else in the plan imports torch

    with reading(name or "model.target.architecture", "config", CONFIG_FILES):
        return AutoConfig.for_model(**architecture).to_dict()


def machine_of(config: DictConfig) -> Machine:
    """Return the machine to plan for: the GPUs of `hardware` that the trainer uses, or this machine's CPU.

    Raises:
        UserError: `trainer.accelerator` is an Apple GPU, or `trainer.devices` is invalid.
    """
    trainer, hardware = config.trainer, config.hardware
    nodes = trainer.get("num_nodes", 1)
    # Plans for GPUs must work on a machine without any, so only `auto` detects the hardware.
    kind = "cuda" if trainer.get("accelerator") == "gpu" else accelerator(config)
    if kind == "mps":
        raise UserError("trainer.accelerator: the plan knows no Apple GPU. Choose cpu, or gpu with hardware.gpu=...")
    if kind == "cpu":
        count = device_count(config, 1)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / count
        return Machine(None, count * nodes, count, memory, _cpu_flops(config))
    gpu, count = GPUS[hardware.gpu], device_count(config, hardware.gpus_per_node)
    rate = gpu.bfloat16 if _autocast(config) else gpu.float32
    return Machine(hardware.gpu, count * nodes, count, gpu.memory, rate)


def _cpu_flops(config: DictConfig) -> float:
    import torch  # needed only to measure this CPU's throughput

    return peak_flops("cpu", torch.bfloat16 if _autocast(config) else torch.float32)


def _autocast(config: DictConfig) -> bool:
    """Return whether bfloat16 autocast is on, with float32 weights."""
    return arithmetic(config) == "bfloat16"


def estimate(config: DictConfig, stage: str, sizes: Sizes, machine: Machine) -> Estimate:
    """Estimate one stage.

    Raises:
        UserError: the global batch does not divide evenly into ranks and micro-batches, or the plan does not support
            the strategy.
    """
    settings, ranks = config.stage[stage], machine.ranks
    try:
        passes = micro_batches_per_step(settings.global_batch_size, settings.micro_batch_size, ranks)
    except ValueError as error:
        raise UserError(f"stage.{stage}.{error}") from error
    share = settings.global_batch_size // ranks
    common = {"max_seq_len": config.data.max_seq_len, "num_anchors": settings.num_anchors}
    common |= {"slot0_loss": settings.module.slot0_loss}
    common |= {"teacher": config.objective.kl > 0 or config.objective.tv > 0}
    flops = step_flops(sizes, stage, rows=share, **common)
    sharing = _sharing(config, ranks)
    setup = Setup(
        rows=share // passes,
        passes=passes,
        chunk=settings.module.chunk,
        attention=_attention(config, machine),
        compiled=config.runtime.compile and sharing.get("zero") != 3,  # not compiled under ZeRO 3
        recompute=config.runtime.activation_checkpointing,
        weight_bytes=DTYPE_BYTES[config.model.target.dtype],
        autocast=_autocast(config),
        ranks=ranks,
        multi_tensor=machine.gpu is not None,
        **common,
        **sharing,
    )
    phases = step_memory(sizes, stage, setup) | _live_decoding(config, stage, sizes, setup)
    phase, _ = peak(phases)
    parts = phases[phase]
    parts["other"] += CONTEXT if machine.gpu else LIBRARIES
    seconds = sum(flops.values()) / (machine.flops * config.hardware.mfu)
    return Estimate(stage, settings.steps, setup, flops, seconds, phase, parts, USABLE * machine.memory)


def _live_decoding(config: DictConfig, stage: str, sizes: Sizes, setup: Setup) -> dict[str, dict[str, float]]:
    """Return the memory phase of live decoding: bytes by part. Empty if no validation prompts are decoded.

    Prompts are beginnings of conversations of unknown length; a full row is assumed.
    """
    settings = config.stage[stage].decode
    if not settings.prompts:
        return {}
    ranks = 1 if setup.zero == 3 else setup.ranks  # under ZeRO 3 every rank decodes all prompts
    prompts = min(settings.batch_size, math.ceil(settings.prompts / ranks))
    room = sizes.positions - settings.max_new_tokens - sizes.block_size
    length = min(config.data.max_seq_len, room)
    together = {"prompts": prompts, "prompt_length": length, "new_tokens": settings.max_new_tokens}
    return {"live decoding": decoding_memory(sizes, stage, setup, **together)}


def _attention(config: DictConfig, machine: Machine) -> str:
    """Return the attention kernel, as `models.attention.packed.resolve_kernel` does, but without importing torch."""
    chosen: str = config.runtime.attention
    return chosen if chosen != "auto" else "flex" if machine.gpu else "sdpa"


def _sharing(config: DictConfig, ranks: int) -> dict[str, Any]:
    """Return how the strategy shards memory across ranks, as arguments of `Setup`.

    Raises:
        UserError: the plan does not support the strategy.
    """
    strategy = config.trainer.get("strategy", "auto")
    if isinstance(strategy, DictConfig) and strategy.get("_target_") == "train.loop.zero.ZeroStrategy":
        more = strategy.get("zero_optimization") or {}
        return {"zero": strategy.stage} | ({"reduce_bucket": size} if (size := more.get("reduce_bucket_size")) else {})
    if isinstance(strategy, str) and (strategy == "auto" or strategy.startswith("ddp")):
        return {"ddp": ranks > 1 or strategy != "auto"}
    raise UserError(f"trainer.strategy={strategy}: the plan knows auto, ddp and ZeroStrategy (conf/trainer/).")
