"""τ by groups of prompts: by kind, and by length of the prompt and of the target's own answer."""

from dataclasses import dataclass

from data.sources.kinds import KINDS, LENGTHS, length_group
from models.acceptance import mean_acceptance_length, tau_interval

KIND, PROMPT, ANSWER = "kind", "prompt tokens", "answer tokens"


@dataclass
class Tau:
    """τ of one drafter on a group of prompts, as in `VariantReport`."""

    tau: float
    low: float
    high: float
    verify_steps: int


@dataclass
class Group:
    """Results of all drafters on a group of prompts."""

    prompts: int
    variants: dict[str, Tau]


def labels(kinds: list[str], prompts: list[list[int]], answers: list[list[int]]) -> dict[str, list[str]]:
    """Return the label of each prompt in each grouping."""
    return {
        KIND: kinds,
        PROMPT: [length_group(len(prompt)) for prompt in prompts],
        ANSWER: [length_group(len(answer)) for answer in answers],
    }


def groups(of_prompts: list[str], accepted: dict[str, list[list[int]]]) -> dict[str, Group]:
    """Return τ by label, in the order of kinds and lengths.

    Args:
        of_prompts: the label of each prompt.
        accepted: by drafter, for each prompt, the number of accepted drafts in each verify step.
    """
    order = [*KINDS, *map(length_group, (0, *LENGTHS, LENGTHS[-1] + 1))]
    return {label: _group(of_prompts, accepted, label) for label in sorted(set(of_prompts), key=order.index)}


def _group(of_prompts: list[str], accepted: dict[str, list[list[int]]], label: str) -> Group:
    members = [number for number, own in enumerate(of_prompts) if own == label]
    variants = {name: _tau([steps[number] for number in members]) for name, steps in accepted.items()}
    return Group(len(members), variants)


def _tau(accepted: list[list[int]]) -> Tau:
    every = [count for steps in accepted for count in steps]
    return Tau(mean_acceptance_length(every), *tau_interval(accepted), len(every))
