"""Local generation backend based on transformers."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from data.errors import BadRecord, UserError
from data.preprocess.chat_template import ChatEncoder
from data.regenerate.conversation import REFUSED, OnFinish, Sample, Sampling, derive_seed
from data.sources.records import Conversation

# Sampling parameters in transformers whose values in the target's generation config are ignored.
SAMPLED = {"temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}
WINDOW = 16  # number of batches over which prompts are sorted by length


class LocalBackend:
    """Generates answers with the target in this process, batching prompts of similar length."""

    def __init__(
        self, target: dict[str, Any], tokenizer: PreTrainedTokenizerBase, encoder: ChatEncoder, sampling: Sampling,
        *, batch_size: int, device: str,
    ) -> None:  # fmt: skip
        """Load the target and build its generation settings.

        Raises:
            UserError: the target cannot be loaded, or `max_new_tokens` leaves no room for a prompt.
        """
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        try:
            self.model = AutoModelForCausalLM.from_pretrained(
                target["name"],
                revision=target["revision"],
                dtype=getattr(torch, target["dtype"]),
                attn_implementation="sdpa",
            )
            self.model.to(self.device).eval()  # type: ignore[arg-type]  # transformers wraps `to` without binding it
        except (OSError, ValueError, RuntimeError, AssertionError) as error:
            raise UserError(f"model.target: failed to load the target. {error}") from error
        self.tokenizer, self.encoder, self.sampling, self.batch_size = tokenizer, encoder, sampling, batch_size
        positions = self.model.config.max_position_embeddings
        self.limit = positions - sampling.max_new_tokens  # maximum prompt length in tokens
        if self.limit < 1:
            raise UserError(
                f"regenerate.max_new_tokens={sampling.max_new_tokens} leaves no room for a prompt: the target's "
                f"context length is {positions}. Reduce regenerate.max_new_tokens."
            )
        ends = self.model.generation_config.eos_token_id or tokenizer.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])
        greedy = sampling.temperature == 0
        # Other parameters, e.g. penalties, keep the target's defaults, which decoding with the drafter also uses.
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

    def run(self, samples: Iterable[Sample], on_finish: OnFinish, *, answered_before: bool) -> None:
        """Answer every question in every sample. `answered_before` is ignored."""
        samples = iter(samples)
        while active := list(islice(samples, self.batch_size * WINDOW)):
            while active:
                self._round(active, on_finish)
                active = [sample for sample in active if sample.outcome is None]

    def _round(self, active: list[Sample], on_finish: OnFinish) -> None:
        """Answer the next question in each active sample."""
        asked = []
        for sample in active:
            try:
                prompt = self.encoder.prompt(Conversation(sample.ask()))
                if len(prompt) > self.limit:
                    raise BadRecord(
                        f"the prompt has {len(prompt)} tokens, which leaves no room for "
                        f"max_new_tokens={self.sampling.max_new_tokens}"
                    )
                asked.append((prompt, sample))
            except BadRecord as error:
                sample.outcome = f"{REFUSED}: {error}"
                on_finish(sample)
        asked.sort(key=lambda pair: -len(pair[0]))
        for start in range(0, len(asked), self.batch_size):
            batch = asked[start : start + self.batch_size]
            for (_, sample), tokens in zip(batch, self._generate([prompt for prompt, _ in batch]), strict=True):
                complete = bool(tokens) and tokens[-1] in self.ends
                # `decode` is annotated to return str or list, but returns a list only for batches.
                text = str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
                sample.answer({"content": text}, tokens, complete, len(tokens), self.sampling)
                if sample.outcome:
                    on_finish(sample)

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]]) -> list[list[int]]:
        """Generate one answer per prompt and return its token ids, including the end token if one was generated."""
        longest = max(map(len, prompts))
        padded = [[self.encoder.pad_id] * (longest - len(p)) + p for p in prompts]
        seen = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        if self.generation["do_sample"]:
            torch.manual_seed(derive_seed(self.sampling.seed, str(prompts)))
        output = self.model.generate(
            torch.tensor(padded, device=self.device),
            attention_mask=torch.tensor(seen, device=self.device),
            tokenizer=self.tokenizer,
            **self.generation,
        )
        answers = output[:, longest:].tolist()
        ends = [next((i + 1 for i, token in enumerate(a) if token in self.ends), len(a)) for a in answers]
        return [a[:end] for a, end in zip(answers, ends, strict=True)]
