"""Steps measured by `bench_train_step.py`: a stage 1 training step as in `train`, and two straightforward baselines.

Requires only torch and transformers. Shape names are defined in `data.batch`; times are in seconds, memory is in bytes.
"""

import gc
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from bench_shapes import Block
from torch import Tensor
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache

from data.batch import Batch
from models.attention.layers import Execution
from models.attention.masks import dense, document_causal
from models.draft import DraftModel
from models.draft_config import DraftConfig
from models.hf_cache import forward_cached
from models.loss.block_loss import block_loss
from models.loss.objectives import Objective, slot_weights
from models.target import cached_context, load_target, target_pass

WARM_UP = 2  # steps; with --compile, the first one compiles
Mark = Callable[[str], None]
Step = Callable[[Batch, Mark], Tensor]  # runs one optimizer step, marks the end of each phase, returns the mean loss


def unmarked(phase: str) -> None:
    """Ignore phase marks, for steps that are timed end to end."""


class Training:
    """Target with random weights, drafter and optimizer, with several implementations of a training step."""

    def __init__(
        self,
        architecture: dict,
        *,
        draft_layers: int,
        block_size: int,
        device: torch.device,
        dtype: str,
        execution: Execution,
        objective: Objective,
        chunk: int,
    ) -> None:
        self.device, self.execution, self.objective, self.chunk = device, execution, objective, chunk
        self.autocast = dtype == "bfloat16"
        with torch.device(device):
            self.target = load_target(None, architecture=architecture, dtype=dtype)
            shape = {"num_layers": draft_layers, "block_size": block_size, "calibrator_rank": 0}
            self.draft = DraftModel(self.target, DraftConfig(**shape), dtype=torch.float32)
        self.draft.requires_grad_(False)
        self.trained = [p.requires_grad_(True) for p in self.draft.attention_parameters().values()]
        self.optimizer = torch.optim.AdamW(self.trained, lr=2e-4, weight_decay=0.0, betas=(0.9, 0.95))

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """Run forward passes as `trainer.precision` does: bf16-mixed for a bfloat16 target, 32-true for float32."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            yield

    def fast(self, batch: Batch, mark: Mark = unmarked) -> Tensor:
        """Run a step as `train` does."""
        with self.arithmetic():
            wanted, split = self.objective.needs_target, self.draft.split_layer
            clean = target_pass(self.target, batch, split, with_hidden=wanted, execution=self.execution)
            mark("target pass")
            hidden = self.draft.forward_batch(clean.context, batch, self.execution)
            mark("mask pass")
            loss, weight, _ = block_loss(
                self.draft.logits,
                hidden,
                batch,
                objective=self.objective,
                chunk=self.chunk,
                target_hidden=clean.hidden,
                compiled=self.execution.compile,
            )
            mark("loss")
        (loss / weight).backward()
        mark("mask pass")
        self.update()
        mark("optimizer")
        return (loss / weight).detach()

    def update(self) -> None:
        """Clip the gradients, run the optimizer step and clear the gradients."""
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def dense(self, batch: Batch, mark: Mark = unmarked) -> Tensor:
        """Run a step with dense masks, the target's full forward pass with logits, and all logits in autograd.

        One target pass serves all anchors.
        """
        rows, length = batch.input_ids.shape
        with self.arithmetic():
            mask = dense(document_causal(batch.document_ids), rows, length, length, self.device)
            with torch.no_grad():
                places, cache = {"attention_mask": mask, "position_ids": batch.position_ids}, DynamicCache()
                clean = forward_cached(self.target, batch.input_ids, cache, **places)
            context = cached_context(cache, self.draft.split_layer)
            hidden = self.draft.forward_batch(context, batch, Execution("dense"))
            before = batch.anchors[..., None] + torch.arange(self.draft.block_size - 1, device=self.device)
            row = torch.arange(rows, device=self.device)[:, None, None]
            teacher = clean.logits[row, before] if self.objective.needs_target else None
            loss, weight = self.plain_loss(hidden, batch.labels, teacher)
        (loss / weight).backward()
        self.update()
        mark("all")
        return (loss / weight).detach()

    def naive(self, batch: Batch, blocks: list[Block], mark: Mark = unmarked) -> Tensor:
        """Run a step like `dense`, but with a separate forward pass of the target over the prefix of each block."""
        size = self.draft.block_size
        total = torch.zeros(2, device=self.device)
        for block in blocks:
            # Only objectives that compare distributions need the target's predictions beyond the anchor.
            end = block.anchor + (size if self.objective.needs_target else 0)
            prefix = block.anchor - block.start
            with self.arithmetic():
                with torch.no_grad():
                    cache = DynamicCache()
                    clean = forward_cached(self.target, batch.input_ids[block.row, block.start : end][None], cache)
                cached = cached_context(cache, self.draft.split_layer)
                context = [(keys[:, :, :prefix], values[:, :, :prefix]) for keys, values in cached]
                positions = prefix + torch.arange(size, device=self.device)[None, None]
                teacher = clean.logits[:, None, prefix:-1] if self.objective.needs_target else None
                labels = batch.labels[block.row, block.number][None, None]
                loss, weight = self.plain_loss(self.draft(context, positions), labels, teacher)
            loss.backward()
            total += torch.stack([loss.detach(), weight])
        mark("anchors")
        torch._foreach_div_([p.grad for p in self.trained], total[1])
        self.update()
        mark("optimizer")
        return total[0] / total[1]

    def plain_loss(self, hidden: Tensor, labels: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the differentiable sum of weighted losses and the sum of weights, for fully labeled blocks.

        Args:
            hidden: [R, A, B, H] hidden states of the drafter.
            labels: [R, A, B] labels.
            teacher: [R, A, B-1, V] the target's logits of the drafted slots, or None.
        """
        log_q = self.draft.logits(hidden[:, :, 1:]).float().log_softmax(-1)
        ce = -log_q.gather(-1, labels[:, :, 1:, None])[..., 0]
        values, confidence = self.objective.ce * ce, torch.exp(-ce)
        if teacher is not None:
            log_p = teacher.float().log_softmax(-1)
            variation = (log_q.exp() - log_p.exp()).abs().sum(-1) / 2
            divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
            values = values + self.objective.kl * divergence + self.objective.tv * variation
            confidence = 1 - variation
        weights = slot_weights(self.objective, confidence.detach(), torch.ones_like(ce, dtype=torch.bool))
        return (values * weights).sum(), weights.sum()

    def held(self) -> int:
        """Return the bytes of weights and optimizer state, counting each storage once."""
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        tensors = [*self.target.parameters(), *self.target.buffers(), *self.draft.parameters(), *state]
        storages = [tensor.untyped_storage() for tensor in tensors]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class Clock:
    """Stopwatch with named intervals. On a GPU, marks are CUDA events, which synchronize only if `wait` is set."""

    def __init__(self, device: torch.device, wait: bool = False) -> None:
        self.cuda, self.wait = device.type == "cuda", wait
        self.marks: list[tuple[str, object]] = []
        self.mark("start")

    def mark(self, name: str = "") -> None:
        """End the current interval and name it."""
        if self.cuda and (self.wait or not self.marks):
            torch.cuda.synchronize()
        now = torch.cuda.Event(enable_timing=True) if self.cuda else time.perf_counter()
        if self.cuda:
            now.record()
        self.marks.append((name, now))

    def laps(self) -> list[tuple[str, float]]:
        """Return name and seconds of each interval."""
        if self.cuda:
            torch.cuda.synchronize()
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return [(name, a.elapsed_time(b) / 1e3 if self.cuda else b - a) for (_, a), (name, b) in pairs]


def whole_steps(step: Step, batches: list[Batch], count: int, device: torch.device) -> list[float]:
    """Return the seconds of each of `count` consecutive steps, cycling through the batches."""
    clock = Clock(device)
    for number in range(count):
        step(batches[number % len(batches)], unmarked)
        clock.mark()
    return [seconds for _, seconds in clock.laps()]


def warm_up(training: Training, batches: list[Batch]) -> float:
    """Run untimed steps to compile and to allocate the optimizer state. Return the mean loss of the first step."""
    loss = float(training.fast(batches[0]))
    whole_steps(training.fast, batches[1:], WARM_UP - 1, training.device)
    return loss


def by_phase(step: Step, batches: list[Batch], count: int, device: torch.device) -> dict[str, list[float]]:
    """Return the seconds of each phase in each of `count` steps, synchronizing the device between phases."""
    found: dict[str, list[float]] = {}
    for number in range(count):
        clock = Clock(device, wait=True)
        step(batches[number % len(batches)], clock.mark)
        laps = clock.laps()
        for phase in dict.fromkeys(name for name, _ in laps):
            found.setdefault(phase, []).append(sum(seconds for name, seconds in laps if name == phase))
    return found


def against_floor(times: list[float], flops: float, rate: float) -> dict:
    """Compare the median time with the floor, the time that the FLOPs take at the given rate."""
    seconds, floor = statistics.median(times), flops / rate
    return {"seconds": seconds, "times": times, "floor": floor, "ratio": seconds / floor if floor else None}


def matmul_rate(device: torch.device, dtype: str, size: int, repeats: int) -> float:
    """Return the FLOP/s of the fastest of `repeats` products of two random square matrices."""
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    for _ in range(2):
        a @ b
    clock = Clock(device)
    for _ in range(repeats):
        a @ b
        clock.mark()
    return 2 * size**3 / min(seconds for _, seconds in clock.laps())


def peak_memory(step: Step, batch: Batch, training: Training) -> int:
    """Return the peak tensor memory of a step in bytes, including weights and optimizer state."""
    gc.collect()
    if training.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step(batch, unmarked)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler's own start and stop messages
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(batch, unmarked)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()  # negative for a release
        peak = max(peak, now)
    return training.held() + peak


def compiled_graphs() -> int:
    """Return the number of graphs that torch.compile has built in this process."""
    return counters["stats"]["unique_graphs"]


def first_wait(step: Step, batch: Batch) -> str | None:
    """Return the first source line at which a step synchronizes with the GPU; None if it never does."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(batch, unmarked)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        frame = next((f for f in reversed(frames) if "/torch/" not in f.filename), frames[-1])
        return f"{frame.filename}:{frame.lineno}: {frame.line}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None
