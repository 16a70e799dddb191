"""Answers by a server that speaks OpenAI's protocol."""

import asyncio
import random
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx

from data.errors import BadRecord, UserError
from data.exchanges import REFUSED, Exchange, Finish, Sampling, seed_of
from data.records import Messages

FIRST_REFUSALS = 20  # so many before the first answer, and the requests themselves are at fault
LONGEST_PAUSE = 20.0  # seconds between two tries


class ServerBackend:
    """An OpenAI-compatible server: vLLM, SGLang, `transformers serve`."""

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
