"""Computes the peak memory of one rank in a training step and in live decoding, by part, in bytes.

The allocations of a micro-batch are traced on the real modules (`models.cost.trace`), while weights, optimizer state
and their sharding follow formulas. docs/results/preflight.md compares the totals with peaks measured on CPUs.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from data.batch import Batch
from models.attention.layers import Execution
from models.cost.flops import traced_step
from models.cost.trace import Trace, full_batch, on_fake_cpu, traceable
from models.target import target_pass

FLOAT32 = 4
LIVE_PARAMETERS = 10**9  # DeepSpeed's stage3_max_live_parameters: maximum number of gathered parameters
REDUCE_BUCKET = 2 * 10**8  # Lightning's reduce_bucket_size for DeepSpeed, in elements
PARTS = (
    *("target weights", "drafter weights", "bfloat16 copies", "gradients", "optimizer"),
    *("activations", "logits", "K/V and masks", "other"),
)

Parts = dict[str, float]


@dataclass(frozen=True)
class Sharing:
    """How the training strategy divides memory among the ranks."""

    ranks: int = 1
    ddp: bool = False
    zero: int = 0  # DeepSpeed's ZeRO stage; 0: none
    reduce_bucket: int = REDUCE_BUCKET  # elements

    @property
    def gradients(self) -> float:
        """Fraction of the gradients that a rank stores."""
        return 1 / self.ranks if self.zero >= 2 else 1


@dataclass(frozen=True)
class Weights:
    """Parameter counts of a training stage. The methods convert them to bytes."""

    target: int
    drafter: int  # parameters not shared with the target
    trained: int
    largest: int  # size of the largest trained tensor
    exported: int

    def held(self, sharing: Sharing, word: int) -> Parts:
        """Return the bytes that are held throughout training: weights, optimizer state and the strategy's buffers.

        Args:
            word: bytes per element of the target.
        """
        target, drafter, trained = self.target * word, self.drafter * FLOAT32, self.trained * FLOAT32
        parts: Parts = {"target weights": target, "drafter weights": drafter, "optimizer": 2 * trained}  # two moments
        if sharing.ddp:
            parts["other"] = trained  # gradients are reduced in separate buckets
        if sharing.zero:
            # Moments are sharded; the optimizer updates a flat shard of the weights.
            parts["optimizer"] = 3 * trained / sharing.ranks
        if sharing.zero == 3:
            # Each rank stores its shard. Full parameters are gathered for use, and kept up to DeepSpeed's limit.
            gathered = min(LIVE_PARAMETERS, self.target + self.drafter) * word
            parts |= {"target weights": target / sharing.ranks, "drafter weights": drafter / sharing.ranks}
            parts["other"] = gathered + sharing.reduce_bucket * FLOAT32
        return parts

    def gradients(self, sharing: Sharing) -> float:
        """Return the bytes of all gradients that a rank stores."""
        return self.trained * FLOAT32 * sharing.gradients

    def optimizer_step(self, sharing: Sharing, multi_tensor: bool) -> Parts:
        """Return the bytes of the gradients and of AdamW's temporary tensors during an optimizer step.

        Args:
            multi_tensor: whether AdamW updates all tensors at once rather than one by one; ignored with ZeRO.
        """
        trained, gradients = self.trained * FLOAT32, self.gradients(sharing)
        if sharing.zero:
            flat = 0 if sharing.zero == 3 else trained / sharing.ranks
            return {"gradients": gradients + flat, "optimizer": trained / sharing.ranks}
        return {"gradients": gradients, "optimizer": trained if multi_tensor else 2 * self.largest * FLOAT32}


def micro_batch_memory(
    module: Any,
    batch: Batch,
    *,
    execution: Execution,
    flex: bool,
    autocast: bool,
    waiting: bool,
    gradient_fraction: float = 1,
) -> dict[str, Parts]:
    """Return the bytes that a micro-batch allocates.

    Args:
        module: a stage's training module on the meta device, with `draft`, `trained()` and `loss(batch)`. It cannot be
            used again afterwards.
        execution: the execution settings of `module`.
        flex: whether to leave out dense masks, because FlexAttention will be used instead.
        autocast: whether to compute in bfloat16.
        waiting: whether gradients from earlier micro-batches already exist.
        gradient_fraction: see `Trace`.

    Returns:
        For each phase, the bytes by part at the phase's peak.

    Raises:
        ValueError: the target's layers cannot be traced.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    on_fake_cpu(module, mode)
    target, eager = module.draft.target, nullcontext()
    trace = Trace(
        [*module.parameters(), *module.buffers()],
        target.get_output_embeddings().weight,
        gradient_fraction=gradient_fraction,
        without_masks=flex,
    )
    if execution.compile:
        eager = torch.compiler.set_stance("force_eager")
        for layer in [] if execution.activation_checkpointing else module.draft.layers:
            trace.compile(layer)
    with mode, eager:
        for parameter in module.trained().values():
            if waiting:
                with trace:
                    parameter.grad = torch.zeros_like(parameter)
                trace.store_gradient(parameter)
            parameter.register_post_accumulate_grad_hook(trace.store_gradient)
        traced_step(trace, module.loss, module.draft, batch, autocast=autocast)
    return trace.peaks


def decoding_memory(
    target: PreTrainedModel,
    layers: int,
    *,
    prompts: int,
    prompt_length: int,
    new_tokens: int,
    block_size: int,
) -> Parts:
    """Return the peak bytes that live decoding allocates, by part.

    The peak occurs inside a layer during prefill, after prefill when K/V are moved layer by layer from the packed pass
    to the cache, or when the draft logits are computed.

    Args:
        target: a target on the meta device, possibly with only some of its layers. It cannot be used again afterwards.
        layers: number of layers in the complete target.
        prompts: number of prompts in a batch on this rank.
        prompt_length: number of tokens per prompt.
        new_tokens: maximum number of new tokens per prompt.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    on_fake_cpu(target, mode)
    trace = Trace([*target.parameters(), *target.buffers()], without_masks=True)
    batch = full_batch(prompts, prompt_length, 1, block_size)
    with mode, traceable(target), trace:
        target_pass(target, batch, len(target.model.layers), execution=Execution("dense"))
    word, (vocabulary, hidden) = target.dtype.itemsize, target.get_output_embeddings().weight.shape
    calls = trace.attention
    token = layers * word * sum(call.keys_values for call in calls) / len(calls)
    packed, cache = prompts * prompt_length * token, prompts * (prompt_length + new_tokens + 2 * block_size) * token
    return max(
        {"K/V and masks": cache, "logits": prompts * block_size * vocabulary * (word + 2 * FLOAT32)},
        {
            "K/V and masks": max(packed + cache / layers, packed / layers + cache),
            "activations": prompts * prompt_length * hidden * word,
        },
        {"K/V and masks": packed, "activations": sum(trace.peaks["target pass"].values())},
        key=lambda parts: sum(parts.values()),
    )
