"""Sampling draws from the target's own distribution, however tokens are drafted; selective verification."""

import itertools

import pytest
import torch
from helpers.decoding import GuessingDrafter, endless
from helpers.shared import random_target

from models.decoding import target_sampler
from models.decoding.flex import generate
from models.decoding.sampling import GREEDY, Sampling
from models.decoding.selection import OFF, RELEASE, Selection, drafts_and_confidence
from models.draft_config import DraftConfig

VOCABULARY, PROMPT, DRAWS = 8, [3, 1], 20_000
SETTINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.7),
    Sampling(temperature=1.3, top_k=5),
    Sampling(temperature=1.0, top_p=0.9),
    Sampling(temperature=0.7, top_p=0.3),
    Sampling(temperature=0.5, top_k=7, top_p=0.8),
    Sampling(temperature=1.0, top_k=1),
]


def warped(logits: list[float], sampling: Sampling) -> list[float]:
    """Apply temperature, then top-k, then top-p, with plain Python numbers."""
    weights = torch.tensor([value / sampling.temperature for value in logits], dtype=torch.float64).softmax(-1).tolist()
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    if sampling.top_k:
        order = order[: sampling.top_k]
    total, kept, mass = sum(weights[token] for token in order), [], 0.0
    for token in order:
        kept.append(token)
        mass += weights[token] / total
        if mass >= sampling.top_p:
            break
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(weights))]


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_probabilities_equal_a_computation_by_hand(sampling):
    torch.manual_seed(0)
    logits = 3 * torch.randn(5, 4, 11)
    found = sampling.probabilities(logits)
    assert found.dtype == torch.float64 and found.shape == logits.shape
    for row, column in itertools.product(range(5), range(4)):
        expected = warped(logits[row, column].tolist(), sampling)
        assert found[row, column].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_evenly_spread_points_choose_every_token_in_proportion_to_its_probability(sampling):
    torch.manual_seed(1)
    logits, points = 2 * torch.randn(3, 9), 4096
    uniforms = torch.cat([(torch.arange(points) + 0.5) / points, torch.tensor([0.0, 1 - 2**-24])])
    for row in logits:
        chosen = sampling.choose(row.expand(points + 2, -1), uniforms)
        share = torch.bincount(chosen[:points], minlength=9) / points
        probabilities = sampling.probabilities(row)
        assert (share - probabilities).abs().max() <= 1 / points
        assert (probabilities[chosen] > 0).all()  # also at both ends


def test_no_uniform_number_selects_a_token_of_probability_zero():
    ends = torch.tensor([0.0, 2**-24, 0.5, 1 - 2**-24])
    for forbidden in itertools.product([False, True], repeat=6):
        if all(forbidden):
            continue
        logits = torch.where(torch.tensor(forbidden), -torch.inf, torch.linspace(-40, 40, 6)).expand(4, -1)
        chosen = Sampling(temperature=1.0).choose(logits, ends)
        assert not any(forbidden[token] for token in chosen)


def test_rounding_of_the_cumulative_distribution_never_selects_a_token_past_the_last():
    logits = torch.randn(50, 2000, generator=torch.Generator().manual_seed(3))
    sampling, last = Sampling(temperature=1.0, top_k=1500), torch.full((50,), 1 - 2**-53, dtype=torch.float64)
    chosen = sampling.choose(logits, last)
    assert (sampling.probabilities(logits).cumsum(-1)[:, -1] <= last).any()  # less than 1, by rounding
    assert (chosen < 2000).all() and (sampling.probabilities(logits).gather(1, chosen[:, None]) > 0).all()


def test_a_temperature_of_zero_is_greedy():
    logits = torch.randn(4, 3, 9, generator=torch.Generator().manual_seed(2))
    assert torch.equal(GREEDY.choose(logits, None), logits.argmax(-1))
    assert torch.equal(GREEDY.probabilities(logits).argmax(-1), logits.argmax(-1))
    assert (GREEDY.probabilities(logits).sum(-1) == 1).all()


EXPONENTS = (-1074, -1073, -1022, -1000, -500, -200, -100, -50, 0, 1, 50, 200, 500, 1000, 1023)


@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4, 1e30])
def test_every_float_temperature_gives_a_valid_distribution(exponent, scale):
    """The most likely tokens stay so: a low temperature selects only them, a high one approaches uniform."""
    logits = scale * torch.randn(6, 40, generator=torch.Generator().manual_seed(4))
    logits[:, 7] = -torch.inf  # banned by a processor
    uniforms = torch.linspace(0, 1 - 2**-24, 6)
    for shape in ({}, {"top_k": 5}, {"top_p": 0.9}):
        sampling = Sampling(temperature=2.0**exponent, **shape)
        found = sampling.probabilities(logits)
        assert found.isfinite().all() and (found.sum(-1) - 1).abs().max() < 1e-12
        assert torch.equal(found.gather(1, logits.argmax(-1, keepdim=True))[:, 0], found.amax(-1))
        chosen = sampling.choose(logits, uniforms)
        assert (found.gather(1, chosen[:, None]) > 0).all() and not (chosen == 7).any()
        if exponent <= -100:
            assert torch.equal(chosen, logits.argmax(-1))
        if exponent >= 500 and not shape:
            assert (found[:, :7] - 1 / 39).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p"])
@pytest.mark.parametrize("value", ["1", None, True, float("nan"), float("inf"), -1, -(2.0**-1074), 10**400, 1j])
def test_non_numeric_settings_are_rejected_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name}=.*: must be"):
        Sampling(**{"temperature": 1.0, name: value})


def exact_joint(target, sampling: Sampling) -> torch.Tensor:
    """Compute the joint probability [V, V, V] of the first three new tokens from the logits of all prefixes."""
    pairs = list(itertools.product(range(VOCABULARY), repeat=2))
    with torch.no_grad():
        logits = target(torch.tensor([[*PROMPT, *pair] for pair in pairs])).logits[:, len(PROMPT) - 1 :]
    chances = torch.tensor([[warped(at, sampling) for at in row] for row in logits.tolist()], dtype=torch.float64)
    chances = chances.view(VOCABULARY, VOCABULARY, 3, VOCABULARY)
    first, second, third = chances[0, 0, 0], chances[:, 0, 1], chances[:, :, 2]
    return first[:, None, None] * second[:, :, None] * third


def drawn(target, draft, mode: str, sampling: Sampling, draws: int = DRAWS) -> tuple[torch.Tensor, float]:
    """Count the first three new tokens of each sample [V*V*V]; also return the fraction of accepted drafts."""
    common = {"max_new_tokens": 3, "mode": mode, "sampling": sampling, "selection": OFF}
    result = generate(target, draft, [PROMPT] * draws, seed=11, **common)
    tokens = torch.tensor(result.tokens)
    cells = tokens @ torch.tensor([VOCABULARY**2, VOCABULARY, 1])
    verified = sum(step.verified for row in result.steps for step in row)
    return torch.bincount(cells, minlength=VOCABULARY**3).double(), sum(result.accepted()) / max(1, verified)


def p_value(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Compute the p-value of a chi-square test; cells with an expected count below 5 are pooled."""
    expected = probabilities.flatten() * counts.sum()
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    if expected[-1] == 0:
        if observed[-1]:
            return 0.0
        observed, expected = observed[:-1], expected[:-1]
    statistic = ((observed - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2, dtype=torch.float64), statistic / 2))


def pair_of_small_vocabulary():
    target = endless(vocab_size=VOCABULARY, num_hidden_layers=2, hidden_size=16, intermediate_size=16, seed=3)
    with torch.no_grad():
        target.get_output_embeddings().weight.mul_(0.5)  # flatter distribution, so that many continuations are likely
    torch.manual_seed(3)
    return target, GuessingDrafter(target, DraftConfig(num_layers=1, block_size=4, calibrator_rank=0))


CASES = list(itertools.product(["parallel", "sequential"], [0.7, 1.0]))


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "temperature"), CASES)
def test_samples_follow_the_targets_joint_distribution(mode, temperature):
    target, draft = pair_of_small_vocabulary()
    sampling = Sampling(temperature, top_p=0.9)
    counts, accepted = drawn(target, draft, mode, sampling)
    joint = exact_joint(target, sampling)
    assert joint.sum() == pytest.approx(1) and (joint > 5 / DRAWS).sum() > 50
    assert accepted > 0.25  # of two drafts: about every second sample contains an accepted one
    assert counts[joint.flatten() == 0].sum() == 0
    assert p_value(counts, joint) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "broken"), [("parallel", "one too many"), ("sequential", "all")])
def test_the_distribution_test_fails_for_a_broken_acceptance_rule(mode, broken, monkeypatch):
    rule = target_sampler.accepted_drafts
    rules = {
        "one too many": lambda drafted, predicted: (rule(drafted, predicted) + 1).clamp(max=drafted.shape[-1]),
        "all": lambda drafted, predicted: torch.full_like(rule(drafted, predicted), drafted.shape[-1]),
    }
    target, draft = pair_of_small_vocabulary()
    sampling = Sampling(1.0, top_p=0.9)
    monkeypatch.setattr(target_sampler, "accepted_drafts", rules[broken])
    counts, _ = drawn(target, draft, mode, sampling, draws=4000)
    assert p_value(counts, exact_joint(target, sampling)) < 1e-6


def test_rows_and_seeds_draw_independently_and_a_seed_is_reproducible():
    target = random_target()
    target.generation_config.eos_token_id = None
    first, again, other = (
        generate(target, None, [[5, 6]] * 3, max_new_tokens=12, sampling=Sampling(1.5), seed=seed, stop=set()).tokens
        for seed in (1, 1, 2)
    )
    assert first == again and first != other
    assert len(set(map(tuple, first))) == 3


@pytest.mark.parametrize("threshold", [0.0, 0.01, 0.3, 1.0])
def test_selection_counts_the_leading_drafts_above_the_threshold(threshold):
    confidence = torch.rand(40, 5, 7, generator=torch.Generator().manual_seed(5)) ** 0.3
    confidence[:3] = torch.tensor([0.0, 1.0, 0.3])[:, None, None]
    for rule in ("cumulative_product", "min_confidence", "off"):
        counts = Selection(rule, threshold).count(confidence)
        assert counts.shape == (40, 5)
        for place in itertools.product(range(40), range(5)):
            expected, product = 0, torch.tensor(1.0)
            for value in confidence[place]:
                product = product * value
                likely = {"cumulative_product": product, "min_confidence": value, "off": threshold}[rule]
                if likely < threshold:
                    break
                expected += 1
            assert counts[place] == max(1, expected)  # at least one draft is verified, at no extra cost


def test_confidence_is_the_probability_of_the_most_likely_token():
    logits = 4 * torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(6))
    drafts, confidence = drafts_and_confidence(logits)
    assert torch.equal(drafts, logits.argmax(-1))
    assert torch.allclose(confidence, logits.softmax(-1).amax(-1))
    drafts, confidence = drafts_and_confidence(logits.bfloat16())
    assert confidence.dtype == torch.float32
    assert torch.allclose(confidence, logits.bfloat16().float().softmax(-1).amax(-1))


def test_the_default_rule_is_the_release():
    assert Selection() == RELEASE == Selection("cumulative_product", 0.01)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Sampling, {"temperature": -0.5}, "temperature=-0.5: must be a finite number >= 0; 0 decodes greedily"),
        (Sampling, {"temperature": float("inf")}, "temperature=inf"),
        (Sampling, {"temperature": float("nan")}, "temperature=nan"),
        (Sampling, {"top_k": -1}, "top_k=-1: must be an integer >= 0"),
        (Sampling, {"top_p": 0.0}, "top_p=0.0: must be in .0, 1."),
        (Sampling, {"top_p": 1.5}, "top_p=1.5"),
        (Selection, {"rule": "most"}, "selection='most': expected one of off, cumulative_product, min_confidence"),
        (Selection, {"threshold": -0.1}, "threshold=-0.1: must be a probability"),
        (Selection, {"threshold": 1.1}, "threshold=1.1"),
        (Selection, {"threshold": float("nan")}, "threshold=nan"),
    ],
)
def test_arguments_out_of_range_are_rejected_with_their_value(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)
