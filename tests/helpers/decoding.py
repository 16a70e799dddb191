"""Drafters with correct guesses, prompts, and the tested decoding modes."""

import random

import torch
from helpers.shared import random_target

from models.decoding.reference import autoregressive_generate
from models.decoding.sampling import GREEDY, Sampling
from models.decoding.selection import OFF, Selection
from models.draft import DraftModel
from models.draft_config import DraftConfig

SELECTIONS = (OFF, Selection("cumulative_product", 0.01), Selection("min_confidence", 0.3))


NUCLEUS = Sampling(temperature=0.9, top_k=40, top_p=0.95)


def padded(prompts: list[list[int]], *, left: bool, filler: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(map(len, prompts))
    ids, mask = (torch.full((len(prompts), length), value) for value in (filler, 0))
    for row, tokens in enumerate(prompts):
        part = slice(length - len(tokens), None) if left else slice(len(tokens))
        ids[row, part], mask[row, part] = torch.tensor(tokens), 1
    return ids, mask


def until(tokens: list[int], stop: set[int]) -> list[int]:
    """Return the tokens up to and including the first stop token."""
    end = next((i + 1 for i, token in enumerate(tokens) if token in stop), len(tokens))
    return tokens[:end]


def endless(**changes):
    """Return a random target without stop tokens, predictable because a token depends mostly on the last one."""
    target = random_target(**changes)
    target.generation_config.eos_token_id = target.config.eos_token_id = None
    with torch.no_grad():
        target.get_input_embeddings().weight.mul_(40)  # the layers contribute little in comparison
        target.get_output_embeddings().weight.mul_(3)  # more confident, so that sampling sometimes follows a guess
    return target


class GuessingDrafter(DraftModel):
    """Drafts the tokens that follow the bonus token if only the last token matters, which is sometimes correct.

    Its hidden states still affect the confidence and sometimes the tokens, so that wrong ones are detected.
    """

    def logits(self, hidden, bonus=None):
        logits = super().logits(hidden, bonus)
        if bonus is None:
            return logits
        head, embed = self.target.get_output_embeddings(), self.target.get_input_embeddings()
        guess, guesses = bonus[..., 0], []
        for _ in range(self.block_size):
            guesses.append(guess)
            guess = head(self.target.model.norm(embed(guess))).argmax(-1)
        guesses = torch.stack(guesses, dim=-1)[..., -hidden.shape[-2] :]  # slot 0 may be left out
        spread = logits.std(-1, keepdim=True)
        return logits + 4 * spread * torch.nn.functional.one_hot(guesses, logits.shape[-1])


def guessing(target, *, num_layers: int = 3, block_size: int = 6) -> GuessingDrafter:
    torch.manual_seed(2)
    return GuessingDrafter(target, DraftConfig(num_layers=num_layers, block_size=block_size, calibrator_rank=8))


def random_prompts(generator: random.Random, count: int, longest: int, vocabulary: int = 97) -> list[list[int]]:
    lengths = [generator.randint(1, longest) for _ in range(count)]
    return [[generator.randrange(vocabulary) for _ in range(length)] for length in lengths]


def own_batch(target, prompts: list[list[int]], new_tokens: int, sampling=GREEDY, seed: int = 0) -> list[list[int]]:
    return [
        autoregressive_generate(target, tokens, new_tokens, sampling, seed + row) for row, tokens in enumerate(prompts)
    ]
