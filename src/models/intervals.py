"""How sure a measured τ is."""

import numpy as np


def tau_interval(
    accepted_by_prompt: list[list[int]], *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap over prompts of τ, the mean over all verify steps of all prompts drawn.

    Prompts are drawn, not steps: those of one prompt are alike, and drawn one by one they would promise an interval
    that is too narrow. The generator is its own, so the same lists give the same interval.

    Args:
        accepted_by_prompt: accepted drafts of each verify step, by prompt; prompts without steps are left out.
        level: share of the resamples within the interval.

    Returns:
        Its ends; nan with fewer than two prompts that have steps: one says nothing of how prompts differ.

    Raises:
        ValueError: level or resamples out of range.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level}: expected a share between 0 and 1.")
    if resamples < 1:
        raise ValueError(f"resamples={resamples}: expected at least 1.")
    counted = [accepted for accepted in accepted_by_prompt if accepted]
    if len(counted) < 2:
        return float("nan"), float("nan")
    steps = np.array([len(accepted) for accepted in counted])
    gained = np.array([sum(accepted) for accepted in counted]) + steps  # each step also gains the bonus token
    drawn = np.random.default_rng(seed).integers(len(counted), size=(resamples, len(counted)))
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(gained[drawn].sum(1) / steps[drawn].sum(1), tails)
    return float(low), float(high)
