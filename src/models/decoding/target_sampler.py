"""Chooses the target's tokens, from logits alone or with logits processors and stopping criteria."""

import torch
from torch import Tensor

from models.acceptance import accepted_drafts
from models.decoding.generation_settings import SequenceState
from models.decoding.sampling import Sampling


def uniform_numbers(seed: int, count: int) -> Tensor:
    """Draw `count` uniform samples, one per new token of a row.

    Sampling therefore does not depend on how many drafts were accepted.
    """
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


class TargetSampler:
    """Chooses the tokens of all rows and candidates at once, from logits alone."""

    def __init__(self, sampling: Sampling, seeds: list[int], max_new_tokens: int, device: torch.device) -> None:
        """
        Args:
            seeds: one per row in flight.
        """
        self.sampling, self.uniforms = sampling, None
        if not sampling.greedy:
            self.uniforms = torch.stack([uniform_numbers(seed, max_new_tokens) for seed in seeds]).to(device)

    def accept(self, drafts: Tensor, verified: Tensor, logits: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        """Accept the leading drafts that equal the target's choices, and choose the next bonus token.

        Args:
            drafts: [R, C-1] candidates without the bonus token.
            verified: [R] number of drafts that may be accepted.
            logits: [R, C, V] the target's logits after each candidate.
            number: [R] index of the first token chosen here among all new tokens of the row.

        Returns:
            Numbers of accepted drafts [R] and next bonus tokens [R].
        """
        if self.uniforms is None:
            chosen = self.sampling.choose(logits, None)  # [R, C]
        else:
            numbers = number[:, None] + torch.arange(logits.shape[1], device=number.device)
            numbers = numbers.clamp(max=self.uniforms.shape[1] - 1)
            chosen = self.sampling.choose(logits, self.uniforms.gather(1, numbers))
        accepted = accepted_drafts(drafts, chosen[:, :-1]).minimum(verified)
        return accepted, chosen.gather(1, accepted[:, None])[:, 0]

    def extend(self, other: "TargetSampler") -> None:
        """Add the rows of another sampler with the same settings."""
        if self.uniforms is not None and other.uniforms is not None:
            self.uniforms = torch.cat([self.uniforms, other.uniforms])

    def keep(self, indices: Tensor) -> None:
        """Keep only the rows at these indices, in this order."""
        if self.uniforms is not None:
            self.uniforms = self.uniforms[indices]


class SequentialTargetSampler(TargetSampler):
    """Chooses one token at a time, since each depends on the text before it. Every token synchronizes with the host."""

    def __init__(
        self,
        sampling: Sampling,
        seeds: list[int],
        max_new_tokens: int,
        device: torch.device,
        states: list[SequenceState],
        stop: set[int],
    ) -> None:
        """
        Args:
            states: one per row in flight.
            stop: stop token ids.
        """
        super().__init__(sampling, seeds, max_new_tokens, device)
        self.states, self.stop = list(states), stop

    def accept(self, drafts: Tensor, verified: Tensor, logits: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        found = []
        for row, (own, count) in enumerate(zip(drafts.tolist(), verified.tolist(), strict=True)):
            found.append(self._row(row, own[:count], logits[row]))
        accepted, bonus = torch.tensor(found, device=logits.device).unbind(1)
        return accepted, bonus

    def _row(self, row: int, drafts: list[int], logits: Tensor) -> tuple[int, int]:
        state = self.states[row]
        uniforms = None if self.uniforms is None else self.uniforms[row]
        accepted = 0
        while True:
            token = next_token(state, logits[accepted], self.sampling, uniforms)
            ended = state.add(token) or token in self.stop
            if accepted == len(drafts) or token != drafts[accepted]:
                return accepted, token
            accepted += 1
            if ended:
                return accepted, token

    def extend(self, other: TargetSampler) -> None:
        super().extend(other)
        assert isinstance(other, SequentialTargetSampler)  # all rows in flight have states, or none
        self.states += other.states

    def keep(self, indices: Tensor) -> None:
        super().keep(indices)
        self.states = [self.states[index] for index in indices.tolist()]


def next_token(state: SequenceState, logits: Tensor, sampling: Sampling, uniforms: Tensor | None) -> int:
    """Choose the target's next token.

    Args:
        logits: [V] the target's logits.
        uniforms: [max_new_tokens] uniform samples for the row; unused if greedy.
    """
    scores = state.scores(logits)
    return int(sampling.choose(scores, None if uniforms is None else uniforms[state.new_tokens]))
