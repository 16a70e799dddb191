"""Who writes the answers: the target in this process, or a server."""

import asyncio
import hashlib
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from data.chat import ChatEncoder
from data.errors import BadRecord, UserError
from data.records import Messages

KEPT, CUT_OFF, EMPTY, REPEATS, REFUSED = "kept", "cut off", "empty", "repeats itself", "refused"
WINDOW = 16  # batches that are sorted by length together
FIRST_REFUSALS = 20  # so many before the first answer, and the requests themselves are at fault
LONGEST_PAUSE = 20.0  # seconds between two tries


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn, and which of them are dropped."""

    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    drop_cut_off: bool
    repeat_words: int
    repeat_times: int | None

    def fault(self, text: str, complete: bool) -> str:
        """Why an answer is dropped, or KEPT."""
        if self.drop_cut_off and not complete:
            return CUT_OFF
        if not text.strip():
            return EMPTY
        return REPEATS if self.repeat_times and repeats(text, self.repeat_words, self.repeat_times) else KEPT


def repeats(text: str, words: int, times: int) -> bool:
    """Whether some run of `words` words comes `times` times or more: the answer loops."""
    found, counts = text.split(), {}
    for i in range(len(found) - words + 1):
        run = tuple(found[i : i + words])
        counts[run] = counts.get(run, 0) + 1
        if counts[run] >= times:
            return True
    return False


@dataclass
class Exchange:
    """A conversation while it is answered, one question after the other."""

    id: str
    questions: Messages  # system and user turns
    messages: Messages = field(default_factory=list)
    outcome: str | None = None
    tokens: int = 0

    def ask(self) -> Messages:
        """The conversation up to its next question."""
        asked = sum(message["role"] != "assistant" for message in self.messages)
        upto = next(i for i in range(asked, len(self.questions)) if self.questions[i]["role"] == "user")
        self.messages += self.questions[asked : upto + 1]
        return self.messages

    def answer(self, message: dict[str, str], complete: bool, tokens: int, sampling: Sampling) -> None:
        """Take the answer; sets `outcome` when there is nothing left to ask, or no point in it."""
        self.messages.append({"role": "assistant", **message})
        self.tokens += tokens
        fault = sampling.fault(message["content"], complete)
        asked = sum(message["role"] != "assistant" for message in self.messages)
        if fault != KEPT or asked == len(self.questions):
            self.outcome = fault


Finish = Callable[[Exchange], None]


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
        if target["name"] is None:
            raise UserError("model.target.name is not set, and random weights have nothing to say. Name a target.")
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        try:
            self.model = AutoModelForCausalLM.from_pretrained(
                target["name"],
                revision=target["revision"],
                dtype=getattr(torch, target["dtype"]),
                attn_implementation=target["attn_implementation"],
            )
            self.model.to(self.device).eval()
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"model.target: the target did not load. {error}") from error
        self.tokenizer, self.encoder, self.sampling, self.batch_size = tokenizer, encoder, sampling, batch_size
        self.limit = self.model.config.max_position_embeddings - sampling.max_new_tokens
        ends = self.model.generation_config.eos_token_id or tokenizer.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])
        # Not the model's own generation config: it may hold penalties that a drafter's target does not decode with.
        greedy = sampling.temperature == 0
        how = {} if greedy else {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        self.generation = GenerationConfig(
            do_sample=not greedy,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=sorted(self.ends),
            pad_token_id=encoder.pad_id,
            **how,
        )
        self.revision = getattr(self.model.config, "_commit_hash", None)

    def run(self, exchanges: Iterable[Exchange], finish: Finish) -> None:
        """Answer all questions of all exchanges."""
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
        if self.generation.do_sample:
            torch.manual_seed(seed_of(self.sampling.seed, str(prompts)))
        output = self.model.generate(
            torch.tensor(padded, device=self.device),
            attention_mask=torch.tensor(seen, device=self.device),
            generation_config=self.generation,
        )
        answers = output[:, longest:].tolist()
        ends = [next((i + 1 for i, token in enumerate(a) if token in self.ends), len(a)) for a in answers]
        return [a[:end] for a, end in zip(answers, ends, strict=True)]


class ServerBackend:
    """An OpenAI-compatible server: vLLM, SGLang, `transformers serve`."""

    revision = None  # servers do not tell

    def __init__(
        self, sampling: Sampling, template_kwargs: dict[str, Any],
        *, url: str, model: str, in_flight: int, patience: float, timeout: float, key_file: str | None,
        extra: dict[str, Any],
    ) -> None:  # fmt: skip
        self.sampling, self.url, self.in_flight, self.patience = sampling, url.rstrip("/"), in_flight, patience
        self.timeout = timeout
        self.request = {
            "model": model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            **({"chat_template_kwargs": template_kwargs} if template_kwargs else {}),
            **extra,
        }
        self.headers = {"Authorization": f"Bearer {Path(key_file).read_text().strip()}"} if key_file else {}
        self.away_since: float | None = None
        self.answered = self.refused = 0

    def run(self, exchanges: Iterable[Exchange], finish: Finish) -> None:
        """Answer all questions of all exchanges, many at a time.

        Raises:
            UserError: the server stays away, or refuses everything.
        """
        try:
            asyncio.run(self._all(iter(exchanges), finish))
        except* UserError as errors:
            raise errors.exceptions[0] from None

    async def _all(self, exchanges: Iterator[Exchange], finish: Finish) -> None:
        limits = httpx.Limits(max_connections=self.in_flight, max_keepalive_connections=self.in_flight)
        async with (
            httpx.AsyncClient(timeout=self.timeout, limits=limits, headers=self.headers) as client,
            asyncio.TaskGroup() as workers,
        ):
            for _ in range(self.in_flight):
                workers.create_task(self._worker(client, exchanges, finish))

    async def _worker(self, client: httpx.AsyncClient, exchanges: Iterator[Exchange], finish: Finish) -> None:
        for exchange in exchanges:  # shared by all workers: each takes the next one
            while exchange.outcome is None:
                seed = seed_of(self.sampling.seed, f"{exchange.id}/{len(exchange.messages)}")
                try:
                    exchange.answer(*await self._ask(client, exchange.ask(), seed), self.sampling)
                except BadRecord as error:
                    exchange.outcome = f"{REFUSED}: {error}"
            finish(exchange)

    async def _ask(self, client: httpx.AsyncClient, messages: Messages, seed: int) -> tuple[dict[str, str], bool, int]:
        """What `_read` finds in the reply, after as many tries as it takes while the server is away for a while."""
        pause = 0.5
        while True:
            try:
                body = {**self.request, "messages": messages, "seed": seed}
                response = await client.post(f"{self.url}/chat/completions", json=body)
                if response.status_code == 200:
                    answer = _read(response.json())
                    self.away_since, self.answered = None, self.answered + 1
                    return answer
                problem = f"status {response.status_code}: {response.text:.300}"
                refused = response.status_code not in (408, 425, 429) and response.status_code < 500
            except (httpx.TransportError, ValueError, LookupError, TypeError) as error:  # away, or half a reply
                problem, refused = f"{type(error).__name__}: {error}", False
            if refused:
                self._refuse(response.status_code, problem)
            now = time.monotonic()
            self.away_since = self.away_since or now
            if now - self.away_since > self.patience:
                raise UserError(
                    f"No answer from {self.url} for {self.patience:g} seconds ({problem}). What was answered is kept: "
                    "start the server, and the same command goes on. regenerate.server.patience is how long to wait."
                )
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE)

    def _refuse(self, status: int, problem: str) -> None:
        """A request that the server will never answer: this one's fault, unless it is every one's."""
        self.refused += 1
        if status in (401, 403, 404, 405) or (not self.answered and self.refused >= FIRST_REFUSALS):
            raise UserError(
                f"{self.url} refuses the requests ({problem}). Check regenerate.server.url, .model, .key_file, .extra."
            )
        raise BadRecord(problem)


def _read(reply: dict[str, Any]) -> tuple[dict[str, str], bool, int]:
    """Message, whether it ended by itself, and its tokens."""
    choice = reply["choices"][0]
    message = {"content": choice["message"].get("content") or ""}
    # Servers that take the reasoning out of the answer give it apart; templates want it back under this name.
    if reasoning := choice["message"].get("reasoning_content") or choice["message"].get("reasoning"):
        message["reasoning_content"] = reasoning
    return message, choice.get("finish_reason") != "length", (reply.get("usage") or {}).get("completion_tokens") or 0


def seed_of(seed: int, name: str) -> int:
    """A seed that depends on nothing but these."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest(), "big") >> 1
