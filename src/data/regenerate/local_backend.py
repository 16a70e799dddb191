"""Answers by the target in this process, with transformers."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from data.errors import BadRecord, UserError
from data.preprocess.chat_template import ChatEncoder
from data.regenerate.conversation import REFUSED, Exchange, Finish, Sampling, seed_of

# Settings of sampling in transformers, of which the target's own defaults are not taken.
SAMPLED = {"temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}
WINDOW = 16  # batches that are sorted by length together


class LocalBackend:
    """The target in this process, with transformers: batched, prompts of one length side by side."""

    def __init__(
        self, target: dict[str, Any], tokenizer: PreTrainedTokenizerBase, encoder: ChatEncoder, sampling: Sampling,
        *, batch_size: int, device: str,
    ) -> None:  # fmt: skip
        """
        Raises:
            UserError: the target did not load.
        """
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        try:
            self.model = AutoModelForCausalLM.from_pretrained(
                target["name"],
                revision=target["revision"],
                dtype=getattr(torch, target["dtype"]),
                attn_implementation="sdpa",
            )
            self.model.to(self.device).eval()
        except (OSError, ValueError, RuntimeError, AssertionError) as error:
            raise UserError(f"model.target: the target did not load. {error}") from error
        self.tokenizer, self.encoder, self.sampling, self.batch_size = tokenizer, encoder, sampling, batch_size
        positions = self.model.config.max_position_embeddings
        self.limit = positions - sampling.max_new_tokens  # tokens of the longest prompt
        if self.limit < 1:
            raise UserError(
                f"regenerate.max_new_tokens={sampling.max_new_tokens} leaves no room for a question in the target's "
                f"{positions} positions. Choose fewer."
            )
        ends = self.model.generation_config.eos_token_id or tokenizer.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])
        greedy = sampling.temperature == 0
        # The rest is the target's own defaults: penalties, say, which drafting follows as well.
        sampled = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        self.generation = dict.fromkeys(SAMPLED & GenerationConfig().to_dict().keys()) | {
            "do_sample": not greedy,
            "num_beams": 1,
            "num_return_sequences": 1,
            "max_new_tokens": sampling.max_new_tokens,
            "eos_token_id": sorted(self.ends),
            "pad_token_id": encoder.pad_id,
            **({} if greedy else sampled),
        }

    def run(self, exchanges: Iterable[Exchange], finish: Finish, *, answered_before: bool = False) -> None:
        """Answer all questions of all exchanges; what was answered before makes no difference here."""
        exchanges = iter(exchanges)
        while active := list(islice(exchanges, self.batch_size * WINDOW)):
            while active:
                self._round(active, finish)
                active = [exchange for exchange in active if exchange.outcome is None]

    def _round(self, active: list[Exchange], finish: Finish) -> None:
        """One question of each."""
        asked = []
        for exchange in active:
            try:
                prompt = self.encoder.prompt(exchange.ask())
                if len(prompt) > self.limit:
                    raise BadRecord(f"{len(prompt)} tokens leave no room for an answer")
                asked.append((prompt, exchange))
            except BadRecord as error:
                exchange.outcome = f"{REFUSED}: {error}"
                finish(exchange)
        asked.sort(key=lambda pair: -len(pair[0]))
        for start in range(0, len(asked), self.batch_size):
            batch = asked[start : start + self.batch_size]
            for (_, exchange), tokens in zip(batch, self._generate([prompt for prompt, _ in batch]), strict=True):
                complete = bool(tokens) and tokens[-1] in self.ends
                text = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                exchange.answer({"content": text}, complete, len(tokens), self.sampling)
                if exchange.outcome:
                    finish(exchange)

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]]) -> list[list[int]]:
        """Answers as token ids, the end token included where it came."""
        longest = max(map(len, prompts))
        padded = [[self.encoder.pad_id] * (longest - len(p)) + p for p in prompts]
        seen = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        if self.generation["do_sample"]:
            torch.manual_seed(seed_of(self.sampling.seed, str(prompts)))
        output = self.model.generate(
            torch.tensor(padded, device=self.device),
            attention_mask=torch.tensor(seen, device=self.device),
            tokenizer=self.tokenizer,
            **self.generation,
        )
        answers = output[:, longest:].tolist()
        ends = [next((i + 1 for i, token in enumerate(a) if token in self.ends), len(a)) for a in answers]
        return [a[:end] for a, end in zip(answers, ends, strict=True)]
