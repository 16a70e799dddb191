"""End-to-end evaluation: acceptance of every drafter on every benchmark, then the speed of the last drafter."""

from typing import Any

from omegaconf import DictConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.preprocess.chat_template import ChatEncoder
from data.sources.benchmarks import ALL
from data.sources.records import Conversation
from models.cost.flops import DecodingFlops
from models.decoding.generation_settings import active_settings
from models.decoding.sampling import Sampling
from models.decoding.selection import Selection
from models.draft import DraftModel
from train.evaluate.acceptance import BenchmarkReport, Decoding, Variant, check_baseline, compare, own_answers, pooled
from train.evaluate.groups import labels
from train.evaluate.report import Evaluation
from train.evaluate.throughput import DecoderComparison, measure_speed


def decoding_settings(config: DictConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> Decoding:
    """Build the evaluation's decoding settings from `stage.evaluate`.

    Args:
        tokenizer: the target's tokenizer; required if its `generation_config` has stop strings.

    Raises:
        ValueError: a setting is out of range.
    """
    settings = config.stage.evaluate
    return Decoding(
        max_new_tokens=settings.max_new_tokens,
        sampling=Sampling(settings.temperature, settings.top_k, settings.top_p),
        selection=Selection(settings.selection, settings.threshold),
        batch_size=settings.batch_size,
        seed=config.seed,
        tokenizer=tokenizer,
    )


def evaluate_drafter(
    target: PreTrainedModel,
    variants: dict[str, Variant],
    benchmarks: dict[str, list[Conversation]],
    encoder: ChatEncoder,
    how: Decoding,
    speed: dict[str, Any],
    name: str,
) -> Evaluation:
    """Measure the acceptance of every drafter on every benchmark, and the speed of the last drafter.

    Args:
        variants: drafters by name; speed is measured for the last one, in all modes.
        benchmarks: conversations by benchmark name, containing only system and user turns.
        speed: the settings in `stage.evaluate.speed`.
        name: the target's name.
    """
    reports, prompts, wrong = {}, {}, []
    block_size = max(variant.draft.block_size for variant in variants.values())
    for benchmark, conversations in benchmarks.items():
        own = own_answers(target, encoder, benchmark, conversations, how, block_size)
        wrong += check_baseline(target, benchmark, own, how)
        found = {
            label: compare(target, variant, own, how, f"{benchmark}: {label}") for label, variant in variants.items()
        }
        new_tokens = sum(map(len, own.answers))
        of_prompts = labels(own.kinds, own.tokens, own.answers)
        reports[benchmark] = BenchmarkReport(len(own.tokens), own.left_out, new_tokens, found, of_prompts)
        prompts[benchmark] = own.tokens
    if len(reports) > 1:
        reports[ALL] = pooled(list(reports.values()))
    measured = None
    if speed["num_prompts"]:
        last = list(variants.values())[-1]
        comparison = DecoderComparison(
            target, last.draft, last.calibrate, count_decoding(last.draft), how, speed["repeats"]
        )
        few = {benchmark: tokens[: speed["num_prompts"]] for benchmark, tokens in prompts.items()}
        measured = measure_speed(comparison, few, speed["batch_sizes"], speed["thresholds"])
    dtype = str(target.dtype).removeprefix("torch.")
    return Evaluation(how, dtype, name, reports, measured, wrong, active_settings(target))


def count_decoding(draft: DraftModel) -> DecodingFlops | None:
    """Return the FLOP counts for decoding with a drafter, or None if its target cannot be traced."""
    try:
        return DecodingFlops.of(draft)
    except ValueError:
        return None
