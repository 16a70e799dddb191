"""The target's tokens after candidates: from its logits alone, or with processors and criteria that see the text."""

import torch
from torch import Tensor

from models.acceptance import accepted_drafts
from models.decoding.generation_settings import Text
from models.decoding.sampling import Sampling


def uniform_numbers(seed: int, count: int) -> Tensor:
    """[count] one number for each new token of a row, so that a token does not depend on what was accepted before."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


class Choice:
    """All rows and candidates at once."""

    def __init__(self, sampling: Sampling, seeds: list[int], max_new_tokens: int, device: torch.device) -> None:
        """
        Args:
            seeds: of the rows in flight.
        """
        self.sampling, self.uniforms = sampling, None
        if not sampling.greedy:
            self.uniforms = torch.stack([uniform_numbers(seed, max_new_tokens) for seed in seeds]).to(device)

    def after(self, drafts: Tensor, verified: Tensor, logits: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        """Which drafts the target agrees with, and the token that it chooses after them.

        Args:
            drafts: [R, C-1] the candidates but for the first.
            verified: [R] how many of a row's drafts count.
            logits: [R, C, V] the target's, after each candidate.
            number: [R] new tokens of each row before the first choice.

        Returns:
            [R] leading drafts that are accepted, [R] the next bonus token.
        """
        if self.uniforms is None:
            chosen = self.sampling.choose(logits, None)  # [R, C]
        else:
            numbers = number[:, None] + torch.arange(logits.shape[1], device=number.device)
            numbers = numbers.clamp(max=self.uniforms.shape[1] - 1)
            chosen = self.sampling.choose(logits, self.uniforms.gather(1, numbers))
        accepted = accepted_drafts(drafts, chosen[:, :-1]).minimum(verified)
        return accepted, chosen.gather(1, accepted[:, None])[:, 0]

    def keep(self, places: Tensor) -> None:
        """Forget all rows but these."""
        if self.uniforms is not None:
            self.uniforms = self.uniforms[places]


class ChoiceByText(Choice):
    """One row and token after the other, since each is chosen by what is before it; the host waits for each."""

    def __init__(
        self,
        sampling: Sampling,
        seeds: list[int],
        max_new_tokens: int,
        device: torch.device,
        texts: list[Text],
        stop: set[int],
    ) -> None:
        """
        Args:
            texts: of the rows in flight.
            stop: tokens that end a row.
        """
        super().__init__(sampling, seeds, max_new_tokens, device)
        self.texts, self.stop = list(texts), stop

    def after(self, drafts: Tensor, verified: Tensor, logits: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        found = []
        for row, (own, count) in enumerate(zip(drafts.tolist(), verified.tolist(), strict=True)):
            found.append(self._row(row, own[:count], logits[row]))
        accepted, bonus = torch.tensor(found, device=logits.device).unbind(1)
        return accepted, bonus

    def _row(self, row: int, drafts: list[int], logits: Tensor) -> tuple[int, int]:
        text = self.texts[row]
        uniforms = None if self.uniforms is None else self.uniforms[row]
        accepted = 0
        while True:
            token = next_token(text, logits[accepted], self.sampling, uniforms)
            ended = text.add(token) or token in self.stop
            if accepted == len(drafts) or token != drafts[accepted]:
                return accepted, token
            accepted += 1
            if ended:
                return accepted, token

    def keep(self, places: Tensor) -> None:
        super().keep(places)
        self.texts = [self.texts[place] for place in places.tolist()]


def next_token(text: Text, logits: Tensor, sampling: Sampling, uniforms: Tensor | None) -> int:
    """The token that the target chooses next.

    Args:
        logits: [V] the target's.
        uniforms: [new tokens at most] the row's numbers; not used by greedy decoding.
    """
    scores = text.scores(logits)
    return int(sampling.choose(scores, None if uniforms is None else uniforms[text.new_tokens]))
