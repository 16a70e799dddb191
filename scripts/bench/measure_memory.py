"""Measure the peak memory of training steps on CPU and compare it with the estimate of `models.cost.memory`.

    python scripts/bench/measure_memory.py                       # the tiny experiment, and other shapes and dtypes
    python scripts/bench/measure_memory.py +experiment=tiny ...  # one configuration, both stages

Each measurement runs in a new process that trains a few steps with Lightning. Tensor memory is computed from the
allocations and releases that the profiler reports for PyTorch's CPU allocator, plus the weights, which are allocated
earlier. As a cross-check, the growth of the peak resident set size is reported as well; it also includes allocations by
other libraries and memory that the C library retains. All slots are labeled, as the estimate assumes.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from rich.console import Console
from rich.table import Table

from data.config.compose import composed
from models.draft_config import DraftConfig
from train.names import TRAINED
from train.plan.estimate import machine_of, peak_memory
from train.plan.target import local_config

MB = 10**6
STEPS = 3  # optimizer moments and gradients of the previous step exist from the second step
TINY = "+experiment=tiny"
# A target whose vocabulary dominates its layers, as in real models.
WIDE = [TINY, "model=stand_in", "model.draft.num_layers=3", "model.draft.calibrator_rank=64", "data.max_seq_len=512"]
WIDE += [f"model.target.architecture.{size}" for size in ("vocab_size=8192", "hidden_size=256", "head_dim=32")]
WIDE += [f"model.target.architecture.{size}" for size in ("intermediate_size=768", "num_attention_heads=8")]
WIDE += [f"stage.{stage}.{key}" for stage in TRAINED for key in ("global_batch_size=2", "num_anchors=16")]
FLOAT32, BF16 = ["trainer.precision=32-true"], ["trainer.precision=bf16-mixed"]
WIDE_BF16 = [*WIDE, *BF16, "model.target.dtype=bfloat16"]
SMALL_CHUNKS = [f"stage.{stage}.module.chunk=64" for stage in TRAINED]
ONE_ROW = [f"stage.{stage}.micro_batch_size=1" for stage in TRAINED]
RECOMPUTE = ["runtime.activation_checkpointing=true"]
FEW_BLOCKS = [f"stage.{stage}.num_anchors=4" for stage in TRAINED]
MANY_BLOCKS = [f"stage.{stage}.num_anchors=100" for stage in TRAINED]
FAMILY = "model.target.architecture.model_type="
GEMMA = [f"{FAMILY}gemma3_text", "+model.target.architecture.sliding_window=128"]
EXPERTS = [f"{FAMILY}qwen3_moe", "+model.target.architecture.num_local_experts=16"]
EXPERTS += [f"+model.target.architecture.{size}" for size in ("num_experts_per_tok=4", "moe_intermediate_size=384")]
BEYOND = ["+recipe=beyond", "model.draft.chain_rank=32"]
CASES = {
    "tiny, float32": [TINY, *FLOAT32],
    "tiny, bf16-mixed": [TINY, *BF16],
    "wide, float32": [*WIDE, *FLOAT32],
    "wide, float32, small chunks": [*WIDE, *FLOAT32, *SMALL_CHUNKS],
    "wide, float32, mixture": [*WIDE, *FLOAT32, "objective=mixture"],
    "wide, float32, bf16-mixed": [*WIDE, *BF16],
    "wide, bfloat16 target": WIDE_BF16,
    "wide, bfloat16 target, small chunks": [*WIDE_BF16, *SMALL_CHUNKS],
    "wide, bfloat16 target, two passes": [*WIDE_BF16, *SMALL_CHUNKS, *ONE_ROW],
    "wide, bfloat16 target, mixture": [*WIDE_BF16, "objective=mixture"],
    "wide, bfloat16 target, recompute": [*WIDE_BF16, *RECOMPUTE],
    "wide, bfloat16 target, recompute, small chunks": [*WIDE_BF16, *RECOMPUTE, *SMALL_CHUNKS],
    "wide, bfloat16 target, compiled": [*WIDE_BF16, "runtime.compile=true"],
    "wide, long rows, few blocks": [*WIDE_BF16, *SMALL_CHUNKS, "data.max_seq_len=1000", *FEW_BLOCKS],
    "wide, one row, many blocks": [*WIDE_BF16, *SMALL_CHUNKS, *ONE_ROW, *MANY_BLOCKS],
    "beyond, float32": [*WIDE, *FLOAT32, *BEYOND],
    "beyond, bfloat16 target": [*WIDE_BF16, *BEYOND],
    "beyond, bfloat16 target, small chunks": [*WIDE_BF16, *SMALL_CHUNKS, *BEYOND],
    "experts, float32": [*WIDE, *FLOAT32, *EXPERTS],
    "experts, bf16-mixed": [*WIDE, *BF16, *EXPERTS],
    "experts, bfloat16 target, small chunks": [*WIDE_BF16, *SMALL_CHUNKS, *EXPERTS],
    "experts, recompute, many blocks": [*WIDE_BF16, *RECOMPUTE, *SMALL_CHUNKS, *ONE_ROW, *MANY_BLOCKS, *EXPERTS],
    "experts, compiled": [*WIDE_BF16, *EXPERTS, "runtime.compile=true"],
    "wide, bfloat16 target, LoRA": [*WIDE_BF16, "adapter=lora"],
    "Gemma 3, bfloat16 target, small chunks": [*WIDE_BF16, *SMALL_CHUNKS, *GEMMA],
    "OLMo 2, bfloat16 target, small chunks": [*WIDE_BF16, *SMALL_CHUNKS, f"{FAMILY}olmo2"],
    "Phi 3, bfloat16 target, small chunks": [*WIDE_BF16, *SMALL_CHUNKS, f"{FAMILY}phi3"],
}


class Repeated:
    """Data loader that yields the same batch for every micro-batch."""

    def __init__(self, batch, passes: int) -> None:
        self.batch, self.passes = batch, passes

    def __len__(self) -> int:
        return self.passes

    def __iter__(self):
        return iter([self.batch] * self.passes)


def random_batch(vocabulary: int, rows: int, max_seq_len: int, num_anchors: int, block_size: int):
    """Build a batch of random tokens in which every slot of every block is labeled."""
    import torch

    from data.batch import Batch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (rows, max_seq_len), generator=generator)
    starts = max_seq_len - block_size
    anchors = 1 + torch.stack([torch.randperm(starts, generator=generator)[:num_anchors] for _ in range(rows)])
    anchors = anchors.sort().values
    at = anchors[..., None] + torch.arange(block_size)  # [R, A, B]
    labels = ids.gather(1, at.flatten(1)).view_as(at)
    positions = torch.arange(max_seq_len).expand(rows, -1).contiguous()
    return Batch(ids, positions, torch.zeros_like(ids), anchors, labels)


def prepared(config, stage: str):
    """Build the module, a full micro-batch and the number of micro-batches per step, as the pipeline does."""
    from hydra.utils import instantiate

    from models.attention.layers import Execution
    from models.draft import DraftModel
    from models.lora import LoraDraft
    from train.context import Resources

    settings = config.stage[stage]
    target = Resources(config).target
    import torch

    sizes = DraftConfig(**config.model.draft)
    if stage == "attention_tuning" and config.adapter:
        draft = LoraDraft(target, instantiate(config.adapter), sizes, dtype=torch.float32)
    else:
        draft = DraftModel(target, sizes if stage == "bonus_calibration" else sizes.uncalibrated(), dtype=torch.float32)
    rows = settings.micro_batch_size or settings.global_batch_size
    size = (rows, config.data.max_seq_len, settings.num_anchors, sizes.block_size)
    batch = random_batch(target.config.vocab_size, *size)
    execution = Execution(**{key: config.runtime[key] for key in ("attention", "compile", "activation_checkpointing")})
    return instantiate(settings.module)(target, draft, execution=execution), batch, settings.global_batch_size // rows


def train(config, module, batch, passes: int) -> None:
    """Run a few optimizer steps."""
    import lightning

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False}
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        max_epochs=-1,
        precision=config.trainer.precision,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
        accumulate_grad_batches=passes,
        **quiet,
    )
    # Stage 2 drops blocks whose anchor differs from the target's prediction; the patched target predicts the text.
    with mock.patch("train.loop.modules.bonus_tokens", saying(batch)):
        trainer.fit(module, Repeated(batch, STEPS * passes))


def saying(batch):
    """Return a `bonus_tokens` that does the same computation but returns the batch's own tokens."""
    from models.target import bonus_tokens

    def answer(*arguments):
        bonus_tokens(*arguments)
        return batch.input_ids.gather(1, batch.anchors)

    return answer


def weights_bytes(module) -> int:
    """Return the weight bytes of target and drafter, counting each storage once."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def tensor_peak(config, stage: str) -> int:
    """Return the peak tensor memory in bytes over a few training steps."""
    module, batch, passes = prepared(config, stage)
    return weights_bytes(module) + most_allocated(lambda: train(config, module, batch, passes))


def decoding_peak(config, stage: str, prompt_length: int) -> int:
    """Return the peak tensor memory in bytes of live decoding between two steps, for prompts of the given length."""
    import torch

    from train.loop.validation_decoding import LiveDecoding

    module, _, _ = prepared(config, stage)
    settings, vocabulary = config.stage[stage].decode, module.target.config.vocab_size
    prompts = torch.randint(3, vocabulary, (settings.prompts, prompt_length)).tolist()
    limits = {"max_new_tokens": settings.max_new_tokens, "batch_size": settings.batch_size}
    decoding = LiveDecoding(prompts, **limits)
    return weights_bytes(module) + most_allocated(lambda: decoding._decode(module.draft, prompts))


def most_allocated(run: Callable[[], object]) -> int:
    """Return the peak bytes of tensors allocated during `run`."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()  # negative for a release
        peak = max(peak, now)
    return peak


def resident_peak(config, stage: str) -> int:
    """Return the weight bytes plus the growth of the process's peak resident size during training."""
    module, batch, passes = prepared(config, stage)
    before = _status("VmRSS")
    train(config, module, batch, passes)
    return weights_bytes(module) + _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def estimated(config, stage: str) -> tuple[float, str]:
    """Return the estimated bytes without Python and library overhead, and the peak phase. Excludes live decoding."""
    config = config.copy()
    config.stage[stage].decode.prompts = 0
    result = peak_memory(config, stage, local_config(config), machine_of(config))
    return result.bytes - result.parts["other"], result.phase


def in_fresh_process(kind: str, stage: str, overrides: list[str]) -> int:
    """Run a measurement by name in a fresh process."""
    command = [sys.executable, __file__, "--measure", kind, stage, *overrides]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    overrides = sys.argv[1:]
    if overrides[:1] == ["--measure"]:
        measure = {"tensors": tensor_peak, "resident": resident_peak}[overrides[1]]
        print(json.dumps(measure(composed(overrides[3:]), overrides[2])))
        return
    table = Table(title="Peak of one rank, MB", title_justify="left")
    for column in ("case", "stage", "fullest phase", "estimate", "tensors", "ratio", "resident"):
        table.add_column(column, justify="left" if column in ("case", "stage", "fullest phase") else "right")
    for name, case in ({"given": overrides} if overrides else CASES).items():
        for stage in TRAINED:
            guess, phase = estimated(composed(case), stage)
            real = in_fresh_process("tensors", stage, case)
            resident = in_fresh_process("resident", stage, case)
            print(f"{name}, {stage}: {guess / real:.3f}", file=sys.stderr)
            figures = (f"{guess / MB:.1f}", f"{real / MB:.1f}", f"{guess / real:.3f}", f"{resident / MB:.0f}")
            table.add_row(name, stage, phase, *figures)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
