"""Estimate memory, FLOPs and time of a training stage on the machine given in the settings."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import PretrainedConfig

from data.errors import UserError
from models.attention.layers import Execution
from models.cost.flops import step_flops
from models.cost.hardware import GIB, GPUS, peak_flops
from models.cost.memory import (
    FLOAT32,
    PARTS,
    REDUCE_BUCKET,
    Parts,
    Sharing,
    Weights,
    decoding_memory,
    micro_batch_memory,
)
from models.cost.trace import full_batch, meta_target
from train.loop.meta import count_parameters, meta_module
from train.names import TRAINED
from train.settings.derived import accelerator, arithmetic, device_count, micro_batches_per_step

# Assumed, not measured: GPU memory used by CUDA, its libraries and communication; host memory used by Python and its
# libraries.
CONTEXT, LIBRARIES = 1 * GIB, 1 * GIB
CHECKPOINT = 4 * FLOAT32  # bytes per trained parameter: weight, two optimizer moments, and the best weight so far
USABLE = 0.95  # usable fraction of the memory; the rest is lost to fragmentation


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
class Memory:
    """Estimated peak memory of one rank, in bytes."""

    phase: str  # the phase with the highest memory use
    parts: Parts  # in that phase
    limit: float  # available to one rank

    @property
    def bytes(self) -> float:
        """The sum of all parts."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.bytes <= self.limit


@dataclass(frozen=True)
class Estimate:
    """Estimated cost of one training stage."""

    stage: str
    steps: int
    rows: int  # per micro-batch
    micro_batches: int  # per step and rank
    weights: Weights
    flops: dict[str, float]  # per step and rank, by part
    seconds: float  # per step
    memory: Memory


def machine_of(config: DictConfig) -> Machine:
    """Return the machine to plan for: the GPUs of `hardware` that the trainer uses, or this machine's CPU.

    Raises:
        UserError: `trainer.accelerator` is an Apple GPU, or `trainer.devices` is invalid.
    """
    trainer, hardware = config.trainer, config.hardware
    nodes = trainer.get("num_nodes", 1)
    # It must be possible to plan for GPUs on a machine without any, so only `auto` detects the hardware.
    kind = "cuda" if trainer.get("accelerator") == "gpu" else accelerator(config)
    if kind == "mps":
        raise UserError(
            "plan=true does not support Apple GPUs. Set trainer.accelerator=cpu, or trainer.accelerator=gpu with "
            "hardware.gpu set to the GPU to plan for."
        )
    if kind == "cpu":
        count = device_count(config, 1)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / count
        return Machine(None, count * nodes, count, memory, peak_flops("cpu", getattr(torch, arithmetic(config))))
    gpu, count = GPUS[hardware.gpu], device_count(config, hardware.gpus_per_node)
    rate = gpu.bfloat16 if arithmetic(config) == "bfloat16" else gpu.float32
    return Machine(hardware.gpu, count * nodes, count, gpu.memory, rate)


def estimate(config: DictConfig, stage: str, target: PretrainedConfig, machine: Machine) -> Estimate:
    """Estimate the cost of one training stage.

    Raises:
        UserError: as for `peak_memory`.
    """
    memory = peak_memory(config, stage, target, machine)
    settings = config.stage[stage]
    micro_batches = _micro_batches(config, stage, machine)
    rows = settings.global_batch_size // machine.ranks
    try:
        flops = _flops(config, stage, target, rows)
    except ValueError as error:
        raise UserError(f"model.target: {error}") from error
    return Estimate(
        stage,
        settings.steps,
        rows // micro_batches,
        micro_batches,
        weights_of(config, stage, target),
        flops,
        sum(flops.values()) / (machine.flops * config.hardware.mfu),
        memory,
    )


def peak_memory(config: DictConfig, stage: str, target: PretrainedConfig, machine: Machine) -> Memory:
    """Estimate the peak memory of one rank in a stage.

    Raises:
        UserError: the global batch does not divide evenly into ranks and micro-batches, the strategy is not supported,
            or the drafter does not fit the target.
    """
    settings, sharing = config.stage[stage], _sharing(config, machine.ranks)
    micro_batches = _micro_batches(config, stage, machine)
    rows = settings.global_batch_size // machine.ranks
    weights = weights_of(config, stage, target)
    try:
        phases = dict(_micro_batch(config, stage, target, machine, rows // micro_batches, micro_batches > 1))
        if settings.decode.prompts:
            phases["live decoding"] = _live_decoding(config, stage, target, sharing, weights)
    except ValueError as error:
        raise UserError(f"model.target: {error}") from error
    phases["optimizer"] = weights.optimizer_step(sharing, multi_tensor=machine.gpu is not None)
    if sharing.zero in (1, 2):  # two buckets: one fills while the other is reduced; ZeRO 3 holds one permanently
        buckets = {"other": 2.0 * sharing.reduce_bucket * FLOAT32}
        phases |= {name: parts | buckets for name, parts in phases.items() if name.startswith("backward")}
    held = weights.held(sharing, _word(config))
    phases = {name: {part: held.get(part, 0) + parts.get(part, 0) for part in PARTS} for name, parts in phases.items()}
    phase, parts = max(phases.items(), key=lambda item: sum(item[1].values()))
    parts["other"] += CONTEXT if machine.gpu else LIBRARIES
    return Memory(phase, parts, USABLE * machine.memory)


def _micro_batches(config: DictConfig, stage: str, machine: Machine) -> int:
    """Return the number of micro-batches per step and rank.

    Raises:
        UserError: the global batch does not divide evenly.
    """
    settings = config.stage[stage]
    try:
        return micro_batches_per_step(settings.global_batch_size, settings.micro_batch_size, machine.ranks)
    except ValueError as error:
        raise UserError(f"stage.{stage}.{error}") from error


def weights_of(config: DictConfig, stage: str, target: PretrainedConfig) -> Weights:
    """Count the parameters of a stage's module.

    Raises:
        UserError: the drafter does not fit the target.
    """
    try:
        return _once(config, stage, target, (), lambda: count_parameters(config, stage, target))
    except ValueError as error:
        raise UserError(f"{'adapter.' if config.adapter else 'model.draft.'}{error}") from error


_RESULTS: dict[tuple, Any] = {}  # cache of `_once`; the changes that a plan tries have most results in common


def _once(
    config: DictConfig, stage: str, target: PretrainedConfig, arguments: tuple, compute: Callable[[], Any]
) -> Any:
    """Return the cached result of `compute`, which must depend only on the stage's module and on `arguments`."""
    module = OmegaConf.to_yaml(config.stage[stage].module, resolve=True)
    model = OmegaConf.to_yaml(OmegaConf.create([config.model.draft, config.adapter, config.model.target.dtype]))
    key = (compute.__qualname__, stage, module, model, target.to_json_string(), *arguments)
    if key not in _RESULTS:
        _RESULTS[key] = compute()
    return _RESULTS[key]


def _flops(config: DictConfig, stage: str, target: PretrainedConfig, rows: int) -> dict[str, float]:
    shape = {"rows": rows, "max_seq_len": config.data.max_seq_len, "num_anchors": config.stage[stage].num_anchors}

    def compute() -> dict[str, float]:
        module = meta_module(config, stage, target)
        return step_flops(module.loss, module.draft, **shape)

    return _once(config, stage, target, tuple(shape.values()), compute)


def _micro_batch(
    config: DictConfig, stage: str, target: PretrainedConfig, machine: Machine, rows: int, several: bool
) -> dict[str, Parts]:
    """Return the memory use of a micro-batch in bytes, by phase and part.

    Args:
        several: whether a step consists of more than one micro-batch.
    """
    sharing, runtime, draft = _sharing(config, machine.ranks), config.runtime, config.model.draft
    kernel = runtime.attention if runtime.attention != "auto" else "flex" if machine.gpu else "sdpa"
    execution = Execution(
        "dense" if kernel == "flex" else kernel,
        compile=runtime.compile and sharing.zero != 3,  # not compiled under ZeRO 3
        activation_checkpointing=runtime.activation_checkpointing,
    )
    how = {"flex": kernel == "flex", "autocast": arithmetic(config) == "bfloat16"}
    how |= {"waiting": several or sharing.zero == 3, "gradient_fraction": sharing.gradients}
    shape = (rows, config.data.max_seq_len, config.stage[stage].num_anchors, draft.block_size)

    def compute() -> dict[str, Parts]:
        module = meta_module(config, stage, target, execution=execution, last_layers=draft.num_layers + 1)
        return micro_batch_memory(module, full_batch(*shape), execution=execution, **how)

    return _once(config, stage, target, (execution, *how.values(), *shape), compute)


def _live_decoding(
    config: DictConfig, stage: str, target: PretrainedConfig, sharing: Sharing, weights: Weights
) -> Parts:
    """Return the memory of live decoding, in bytes by part.

    The prompts are not read, so each is assumed to be as long as a full row.
    """
    settings, draft = config.stage[stage].decode, config.model.draft
    ranks = 1 if sharing.zero == 3 else sharing.ranks  # under ZeRO 3 every rank decodes all prompts
    prompts = min(settings.batch_size, math.ceil(settings.prompts / ranks))
    room = target.max_position_embeddings - settings.max_new_tokens - draft.block_size
    shape = {"prompts": prompts, "prompt_length": min(config.data.max_seq_len, room)}
    shape |= {"new_tokens": settings.max_new_tokens, "block_size": draft.block_size}

    def compute() -> Parts:
        built = meta_target(target, getattr(torch, config.model.target.dtype), draft.num_layers + 1)
        return decoding_memory(built, target.num_hidden_layers, **shape)

    parts = _once(config, stage, target, tuple(shape.values()), compute)
    copy = weights.exported * _word(config)  # copy of the drafter in the target's dtype
    return parts | {"gradients": weights.gradients(sharing), "drafter weights": copy}


def _word(config: DictConfig) -> int:
    """Return the size of one target weight in bytes."""
    return getattr(torch, config.model.target.dtype).itemsize


def _sharing(config: DictConfig, ranks: int) -> Sharing:
    """Return how the strategy divides memory between ranks.

    Raises:
        UserError: the strategy is not supported.
    """
    strategy = config.trainer.get("strategy", "auto")
    if isinstance(strategy, DictConfig) and strategy.get("_target_") == "train.loop.zero.ZeroStrategy":
        more = strategy.get("zero_optimization") or {}
        return Sharing(ranks, zero=strategy.stage, reduce_bucket=more.get("reduce_bucket_size") or REDUCE_BUCKET)
    if isinstance(strategy, str) and (strategy == "auto" or strategy.startswith("ddp")):
        return Sharing(ranks, ddp=ranks > 1 or strategy != "auto")
    raise UserError(f"trainer.strategy={strategy}: plan=true expects auto, ddp or ZeroStrategy (conf/trainer/).")


def disk_parts(config: DictConfig, target: PretrainedConfig, stages: list[str]) -> dict[str, int]:
    """Return the disk usage of the run directory in bytes, by part.

    The checkpoints of a stage are deleted when it finishes, so only the largest set counts.
    """
    trained = [stage for stage in TRAINED if stage in stages]
    last = TRAINED[1] if TRAINED[1] in config.stages else TRAINED[0]
    weights = {stage: weights_of(config, stage, target) for stage in {*trained, last}}
    # One more than `keep_checkpoints`: a new checkpoint is written before the oldest is deleted.
    checkpoints = [(config.stage[s].keep_checkpoints + 1) * CHECKPOINT * weights[s].trained for s in trained]
    exported = getattr(torch, config.export.dtype).itemsize * weights[last].exported
    return {
        "checkpoints of a stage": max(checkpoints, default=0),
        "trained drafters": FLOAT32 * sum(weights[stage].exported for stage in trained),
        "export": exported if "export" in stages else 0,
    }
