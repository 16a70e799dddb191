"""Decoding with the extensions beyond the paper: the reference's steps in each mode, and the target's own output."""

import itertools
import random

import pytest
import torch
from helpers.decoding import NUCLEUS, endless, own_batch, random_prompts

from models.decoding.flex import generate
from models.decoding.reference import reference_generate
from models.decoding.sampling import GREEDY
from models.decoding.selection import OFF, Selection
from models.draft import DraftModel
from models.draft_config import DraftConfig


class ChainedDrafter(DraftModel):
    """Drafter with a bonus slot that guesses each slot's token from the previous draft alone."""

    def _chain(self, hidden, previous):
        bias = super()._chain(hidden, previous)
        head, embed = self.target.get_output_embeddings(), self.target.get_input_embeddings()
        guess = head(self.target.model.norm(embed(previous.clamp(min=0)))).argmax(-1)
        spread = head(hidden).std(-1, keepdim=True)
        return bias + 3 * spread * torch.nn.functional.one_hot(guess, bias.shape[-1])


def chained(target) -> ChainedDrafter:
    torch.manual_seed(3)
    ranks = {"calibrator_rank": 8, "chain_rank": 4}
    draft = ChainedDrafter(target, DraftConfig(num_layers=3, block_size=6, bonus_slot=True, **ranks))
    with torch.no_grad():
        for name, parameter in draft.own_parameters().items():
            parameter.add_((3.0 if name.startswith("bonus_slot") else 0.1) * torch.randn_like(parameter))
    return draft


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [GREEDY, NUCLEUS], ids=["greedy", "sampled"])
@pytest.mark.parametrize("selection", [OFF, Selection("min_confidence", 0.3)], ids=str)
def test_with_bonus_slot_and_chain_each_mode_takes_the_steps_of_its_reference(sampling, selection):
    target = endless()
    draft, batch = chained(target), random_prompts(random.Random(6), 5, 20)
    own = own_batch(target, batch, 13, sampling, seed=7)
    common, steps = {"selection": selection, "sampling": sampling}, {}
    for drafter, mode in itertools.product((draft, draft.without_extras()), ("sequential", "parallel")):
        bonus_known = mode == "sequential"
        expected = [
            reference_generate(target, drafter, tokens, 13, seed=7 + row, bonus_known=bonus_known, **common)
            for row, tokens in enumerate(batch)
        ]
        result = generate(target, drafter, batch, max_new_tokens=13, mode=mode, seed=7, **common)
        assert result.tokens == own == [alone.tokens[0] for alone in expected]
        assert result.steps == [alone.steps[0] for alone in expected]
        steps[drafter is draft, mode] = result.steps
    assert sum(step.accepted for row in steps[True, mode] for step in row) > 5
    assert steps[False, "sequential"] == steps[False, "parallel"]  # as the export contract specifies
    assert len({str(found) for found in steps.values()}) == 3  # bonus slot and chain make a difference
