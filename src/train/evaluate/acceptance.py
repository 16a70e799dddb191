"""Acceptance and losslessness, measured by decoding benchmarks with the drafter and with the target alone."""

from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.preprocess.chat_template import ChatEncoder
from data.sources.kinds import OPENED, answer_kind
from data.sources.records import Conversation, Messages
from models.acceptance import acceptance_by_slot, mean_acceptance_length, tau_interval
from models.decoding.flex import GenerationResult, generate
from models.decoding.forward_passes import difference_from_forward
from models.decoding.generation_settings import sequence_state
from models.decoding.reference import autoregressive_generate
from models.decoding.sampling import Sampling
from models.decoding.selection import Selection
from models.draft import DraftModel
from models.families import max_text_length
from train.evaluate.groups import Group, groups

REASONING_TOKENS = 16  # tokens at the end of a prompt that may open a reasoning block


@dataclass(frozen=True)
class Decoding:
    """Decoding settings shared by all decoders of an evaluation."""

    max_new_tokens: int
    sampling: Sampling
    selection: Selection
    batch_size: int
    seed: int = 0
    tokenizer: PreTrainedTokenizerBase | None = None  # the target's; required if it has stop strings


@dataclass(frozen=True)
class Variant:
    """A drafter and its decoding mode."""

    draft: DraftModel
    calibrate: bool
    mode: str = "auto"  # the `mode` argument of `generate`


@dataclass
class Prompts:
    """A benchmark's prompts, one per conversation turn, with the target's own answers."""

    tokens: list[list[int]]
    answers: list[list[int]]
    left_out: int = 0  # skipped turns: those whose answer could exceed the context length, and all turns after them
    kinds: list[str] = field(default_factory=list)  # kind of each answer (`data.sources.kinds`)


@dataclass
class Difference:
    """First position at which an output differs from the target's own output."""

    prompt: int
    token: int
    margin: float  # between the target's top two scores at that position; near 0, rounding decides


@dataclass
class VariantReport:
    """One drafter's results on all prompts of a benchmark."""

    tau: float  # mean acceptance length, micro-averaged over verify steps
    low: float  # 95% confidence interval of τ, bootstrapped over prompts
    high: float
    verify_steps: int
    verified: float  # mean number of verified drafts per step
    identical: int  # number of prompts whose output equals the target's own
    differences: list[Difference]
    acceptance_by_slot: list[float]  # for slots 1 .. B-1, the fraction of verify steps that accepted them
    accepted: list[list[int]]  # per prompt, the number of accepted drafts in each verify step


@dataclass
class BenchmarkReport:
    """Results of all drafters on one benchmark."""

    prompts: int
    left_out: int
    new_tokens: int  # in the target's own answers
    variants: dict[str, VariantReport]
    labels: dict[str, list[str]] = field(default_factory=dict)  # by grouping (`groups.labels`), of each prompt

    def groups(self) -> dict[str, dict[str, Group]]:
        """Return τ by grouping and label."""
        accepted = {name: variant.accepted for name, variant in self.variants.items()}
        return {grouping: groups(of_prompts, accepted) for grouping, of_prompts in self.labels.items()}

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-serializable dict."""
        by = {f"by_{grouping.replace(' ', '_')}": found for grouping, found in self.groups().items()}
        found = asdict(self) | {key: {label: asdict(group) for label, group in of.items()} for key, of in by.items()}
        del found["labels"]
        return found


def own_answers(
    target: PreTrainedModel,
    encoder: ChatEncoder,
    name: str,
    conversations: list[Conversation],
    how: Decoding,
    block_size: int = 0,
) -> Prompts:
    """Generate the target's answers to all turns, each conditioned on the target's earlier answers.

    Skip a turn, and all later turns of its conversation, if the target's context length leaves no room for an answer
    followed by a block of `block_size` slots.
    """
    limit = max_text_length(target.config, block_size) - how.max_new_tokens
    prompts = Prompts([], [])
    talks: list[Messages] = [[] for _ in conversations]
    turns = [_turns(conversation.messages) for conversation in conversations]
    going = list(range(len(conversations)))
    for turn in range(max(map(len, turns))):
        going = [i for i in going if turn < len(turns[i])]
        asked = {i: encoder.prompt(replace(conversations[i], messages=talks[i] + turns[i][turn])) for i in going}
        going = [i for i in going if len(asked[i]) <= limit]
        prompts.left_out += sum(len(turns[i]) - turn for i in asked if i not in going)
        asking = [asked[i] for i in going]
        answers = decode(target, None, asking, how, f"{name}: target alone", first=len(prompts.tokens)).tokens
        for i, answer in zip(going, answers, strict=True):
            text = encoder.backend.decode(answer, skip_special_tokens=True)
            talks[i] += [*turns[i][turn], {"role": "assistant", "content": text}]
            prompts.tokens.append(asked[i])
            prompts.answers.append(answer)
            prompts.kinds.append(_kind(encoder, replace(conversations[i], messages=talks[i]), asked[i], answer))
    return prompts


def _kind(encoder: ChatEncoder, answered: Conversation, prompt: list[int], answer: list[int]) -> str:
    """Return the declared kind of a conversation, or the kind of its last answer, given the tokens of both."""
    if answered.kind:
        return answered.kind
    text = encoder.backend.decode(answer, skip_special_tokens=False)  # reasoning tags may be special tokens
    for token in encoder.stop_tokens:
        text = text.removesuffix(token)
    answered = replace(answered, messages=[*answered.messages[:-1], answered.messages[-1] | {"content": text}])
    end = encoder.backend.decode(prompt[-REASONING_TOKENS:], skip_special_tokens=False)
    return answer_kind(answered, len(answered.messages) - 1, reasoning=OPENED.search(end) is not None)


def _turns(messages: Messages) -> list[Messages]:
    """Split a conversation into one list of messages per user turn; a system message goes into the first list."""
    turns: list[Messages] = [[]]
    for message in messages:
        turns[-1].append(message)
        if message["role"] == "user":
            turns.append([])
    return turns[:-1]


def decode(
    target: PreTrainedModel,
    variant: Variant | None,
    prompts: list[list[int]],
    how: Decoding,
    say: str,
    *,
    first: int = 0,
) -> GenerationResult:
    """Decode all prompts in batches with a drafter, or with the target alone if `variant` is None.

    Each prompt is seeded by its index; `first` is the index of the first prompt.
    """
    decoded = GenerationResult([], [])
    choice: dict[str, Any] = {"calibrate": variant.calibrate, "mode": variant.mode} if variant else {}
    with tqdm(total=len(prompts), desc=say, unit="prompt") as bar:
        for start in range(0, len(prompts), how.batch_size):
            batch = prompts[start : start + how.batch_size]
            result = generate(
                target,
                variant.draft if variant else None,
                batch,
                max_new_tokens=how.max_new_tokens,
                sampling=how.sampling,
                selection=how.selection,
                tokenizer=how.tokenizer,
                seed=[prompt_seed(how, first + start + i) for i in range(len(batch))],
                **choice,
            )
            decoded.tokens += result.tokens
            decoded.steps += result.steps
            bar.update(len(batch))
    return decoded


def prompt_seed(how: Decoding, number: int) -> int:
    """Return the seed for a prompt. Each prompt has its own seed, so answers do not depend on the batching."""
    return 1_000_003 * how.seed + number


def compare(target: PreTrainedModel, variant: Variant, prompts: Prompts, how: Decoding, say: str) -> VariantReport:
    """Decode with a drafter and compare every token with the target's own output."""
    got = decode(target, variant, prompts.tokens, how, say)
    accepted = [[step.accepted for step in steps] for steps in got.steps]
    scored = [step.verified for steps in got.steps for step in steps]
    differences = first_differences(target, prompts, got.tokens, how.tokenizer)
    return _report(accepted, sum(scored) / max(1, len(scored)), differences, variant.draft.block_size)


def pooled(reports: list[BenchmarkReport]) -> BenchmarkReport:
    """Merge all benchmark reports into a single report over all prompts."""
    first = [sum(report.prompts for report in reports[:i]) for i in range(len(reports))]
    variants = {}
    for name, one in reports[0].variants.items():
        found = [report.variants[name] for report in reports]
        steps = max(1, sum(v.verify_steps for v in found))
        differences = [
            replace(d, prompt=d.prompt + start) for v, start in zip(found, first, strict=True) for d in v.differences
        ]
        variants[name] = _report(
            [steps for v in found for steps in v.accepted],
            sum(v.verified * v.verify_steps for v in found) / steps,
            differences,
            1 + len(one.acceptance_by_slot),
        )
    totals = {key: sum(getattr(report, key) for report in reports) for key in ("prompts", "left_out", "new_tokens")}
    of_prompts = {
        grouping: [x for report in reports for x in report.labels[grouping]] for grouping in reports[0].labels
    }
    return BenchmarkReport(**totals, variants=variants, labels=of_prompts)


def _report(
    accepted: list[list[int]], verified: float, differences: list[Difference], block_size: int
) -> VariantReport:
    every = [a for steps in accepted for a in steps]
    low, high = tau_interval(accepted)
    return VariantReport(
        tau=mean_acceptance_length(every),
        low=low,
        high=high,
        verify_steps=len(every),
        verified=verified,
        identical=len(accepted) - len(differences),
        differences=differences,
        acceptance_by_slot=acceptance_by_slot(every, block_size),
        accepted=accepted,
    )


def first_differences(
    target: PreTrainedModel,
    prompts: Prompts,
    outputs: list[list[int]],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[Difference]:
    """Return the first difference for each prompt whose output is not the target's own."""
    differences = []
    for number, (prompt, own, got) in enumerate(zip(prompts.tokens, prompts.answers, outputs, strict=True)):
        if own == got:
            continue
        at = next((i for i, pair in enumerate(zip(own, got, strict=False)) if pair[0] != pair[1]), None)
        at = min(len(own), len(got)) if at is None else at
        before = torch.tensor([prompt + own[:at]], device=target.device)
        so_far = sequence_state(target, prompt, len(own) + 1, tokenizer)
        for token in own[:at]:
            so_far.add(token)
        with torch.inference_mode():
            best = so_far.scores(target(input_ids=before, logits_to_keep=1).logits[0, -1]).topk(2).values
        differences.append(Difference(number, at, float(best[0] - best[1])))
    return differences


def check_baseline(target: PreTrainedModel, name: str, prompts: Prompts, how: Decoding, count: int = 2) -> list[str]:
    """Check that our forward passes of the target match transformers' own model and KV cache.

    The logits after the first prompt are compared in any dtype; the tokens of the first `count` answers are also
    compared in float32 and float64.

    Returns:
        One message per difference.
    """
    off = difference_from_forward(target, prompts.tokens[0])
    exact = target.dtype in (torch.float32, torch.float64)
    wrong = (
        [f"{name}: the target's logits differ from those of transformers by {off:.1%} of the largest"] if off else []
    )
    for number, (prompt, own) in enumerate(zip(prompts.tokens[:count], prompts.answers, strict=False)):
        seed = prompt_seed(how, number)
        settings = (how.max_new_tokens, how.sampling, seed, how.tokenizer)
        if exact and autoregressive_generate(target, prompt, *settings) != own:
            wrong.append(f"{name}: prompt {number}: the target's answer differs from that of transformers")
    return wrong


def histogram(accepted: list[list[int]]) -> dict[int, int]:
    """Return the number of verify steps for each acceptance length."""
    counts = Counter(a + 1 for steps in accepted for a in steps)
    return dict(sorted(counts.items()))
