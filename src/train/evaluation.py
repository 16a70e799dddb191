"""Decode held-out prompts for real and compare with the target's own greedy output."""

import time
from dataclasses import asdict, dataclass
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel

from models.decoding import GenerationResult, generate
from models.draft import DraftModel
from models.metrics import acceptance_by_slot, mean_acceptance_length


@dataclass
class VariantReport:
    """What one drafter gave on all prompts."""

    tau: float  # mean acceptance length, micro average over verify steps
    verify_steps: int
    identical: int  # prompts whose output equals the target's own
    tokens_per_second: float
    acceptance_by_slot: list[float]  # slots 1 .. B-1: share of verify steps that accepted the slot
    accepted: list[int]  # accepted drafts of every verify step


@dataclass
class EvaluationReport:
    """What decoding said of a drafter."""

    prompts: int
    max_new_tokens: int
    dtype: str
    target_tokens_per_second: float
    variants: dict[str, VariantReport]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def lossless(self) -> bool:
        """Whether every variant gave the target's own output on every prompt."""
        return all(variant.identical == self.prompts for variant in self.variants.values())


def evaluate(
    target: PreTrainedModel, variants: dict[str, tuple[DraftModel, bool]], prompts: list[list[int]], max_new_tokens: int
) -> EvaluationReport:
    """Decode each prompt by the target alone and by every variant.

    Args:
        variants: name -> (drafter, whether to use its calibrator).
        prompts: token ids of each prompt.
    """
    # Warm-up: the first passes of a process allocate and select kernels.
    generate(target, None, prompts[:1], max_new_tokens=8)
    own, own_seconds = [], 0.0
    for prompt in tqdm(prompts, desc="target alone", unit="prompt"):
        result, seconds = _timed(generate, target, None, [prompt], max_new_tokens=max_new_tokens)
        own.append(result)
        own_seconds += seconds
    reports = {}
    for name, (draft, calibrate) in variants.items():
        results, spent = [], 0.0
        for prompt in tqdm(prompts, desc=name, unit="prompt"):
            result, seconds = _timed(
                generate, target, draft, [prompt], max_new_tokens=max_new_tokens, calibrate=calibrate, mode="sequential"
            )
            results.append(result)
            spent += seconds
        reports[name] = _report(results, own, spent, draft.block_size)
    return EvaluationReport(
        prompts=len(prompts),
        max_new_tokens=max_new_tokens,
        dtype=str(target.dtype).removeprefix("torch."),
        target_tokens_per_second=sum(len(r.tokens[0]) for r in own) / own_seconds,
        variants=reports,
    )


def _report(
    results: list[GenerationResult], own: list[GenerationResult], seconds: float, block_size: int
) -> VariantReport:
    accepted = [a for result in results for a in result.accepted()]
    return VariantReport(
        tau=mean_acceptance_length(accepted),
        verify_steps=len(accepted),
        identical=sum(result.tokens == reference.tokens for result, reference in zip(results, own, strict=True)),
        tokens_per_second=sum(len(result.tokens[0]) for result in results) / seconds,
        acceptance_by_slot=acceptance_by_slot(accepted, block_size),
        accepted=accepted,
    )


def _timed(decode, *args: Any, **kwargs: Any) -> tuple[GenerationResult, float]:
    """The result is on the host when decoding returns, so no device is left running."""
    started = time.perf_counter()
    result = decode(*args, **kwargs)
    return result, time.perf_counter() - started
