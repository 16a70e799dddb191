"""Generation backend for servers with an OpenAI-compatible API."""

import asyncio
import random
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx

from data.errors import BadRecord, UserError
from data.regenerate.conversation import REFUSED, OnFinish, OnTokens, Sample, Sampling, derive_seed
from data.sources.records import Messages

FIRST_REJECTIONS = 20  # give up after this many rejections if no request has been answered yet
MAX_FAILURES = 6  # failed attempts (HTTP 500, broken connection, unusable reply) before a request is dropped
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 20.0  # seconds between retries, exponential backoff


class ServerBackend:
    """Generates answers with an OpenAI-compatible server, e.g. vLLM, SGLang or `transformers serve`."""

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
        self.unavailable_since: float | None = None
        self.answered = False
        self.rejected: list[Sample] = []

    def run(
        self, samples: Iterable[Sample], on_finish: OnFinish, *, answered_before: bool, on_tokens: OnTokens
    ) -> None:
        """Answer every question in every sample, with up to `in_flight` concurrent requests.

        Rejected conversations are held back until the server has answered a request, in this run or in an earlier one
        (`answered_before`). Until then, a rejection may mean that the settings are invalid for every request.

        Raises:
            UserError: the server is unreachable, or rejects every request.
        """
        self.answered, self.rejected = answered_before, []
        try:
            asyncio.run(self._all(iter(samples), on_finish, on_tokens))
        except* UserError as errors:
            raise errors.exceptions[0] from None
        if self.rejected:
            raise self._rejection_error(str(self.rejected[0].outcome))

    async def _all(self, samples: Iterator[Sample], on_finish: OnFinish, on_tokens: OnTokens) -> None:
        limits = httpx.Limits(max_connections=self.in_flight, max_keepalive_connections=self.in_flight)
        async with (
            httpx.AsyncClient(timeout=self.timeout, limits=limits, headers=self.headers) as client,
            asyncio.TaskGroup() as workers,
        ):
            for _ in range(self.in_flight):
                workers.create_task(self._worker(client, samples, on_finish, on_tokens))

    async def _worker(
        self, client: httpx.AsyncClient, samples: Iterator[Sample], on_finish: OnFinish, on_tokens: OnTokens
    ) -> None:
        for sample in samples:  # iterator shared by all workers
            while sample.outcome is None:
                seed = derive_seed(self.sampling.seed, f"{sample.id}/{len(sample.messages)}")
                try:
                    message, complete, tokens = await self._ask(client, sample.ask(), seed)
                    sample.answer(message, None, complete, tokens, self.sampling)
                    on_tokens(tokens)
                except BadRecord as error:
                    sample.outcome = f"{REFUSED}: {error}"
            if self.answered:
                for finished in (*self.rejected, sample):
                    on_finish(finished)
                self.rejected = []
            else:
                self.rejected.append(sample)
                if len(self.rejected) >= FIRST_REJECTIONS:
                    raise self._rejection_error(str(sample.outcome))

    async def _ask(self, client: httpx.AsyncClient, messages: Messages, seed: int) -> tuple[dict[str, str], bool, int]:
        """Request an answer and parse it with `_read`. Retry with backoff while the server is unavailable.

        Raises:
            BadRecord: the server cannot answer this request.
            UserError: the server rejects every request, or is unavailable for longer than `patience` seconds.
        """
        pause, failures = FIRST_PAUSE, 0
        while True:
            try:
                body = {**self.request, "messages": messages, "seed": seed}
                response = await client.post(f"{self.url}/chat/completions", json=body)
                if response.status_code == 200:
                    answer = _read(_json(response))
                    self.unavailable_since, self.answered = None, True
                    if isinstance(answer, BadRecord):
                        raise answer
                    return answer
                problem = f"HTTP {response.status_code}: {response.text:.300}"
                self._raise_if_final(response.status_code, problem)
                failures += response.status_code == 500
            except httpx.ConnectError as error:
                problem = f"{type(error).__name__}: {error}"
            except (httpx.TransportError, IncompleteReply) as error:  # failed after accepting the connection
                problem = f"{type(error).__name__}: {error}"
                failures += 1
            # If a request fails repeatedly while the server is alive, the request itself is the cause.
            if failures >= MAX_FAILURES and await self._alive(client):
                raise BadRecord(f"no answer after {failures} attempts ({problem})")
            now = time.monotonic()
            self.unavailable_since = self.unavailable_since or now
            if now - self.unavailable_since > self.patience:
                raise UserError(
                    f"No answer from {self.url} for {self.patience:g} seconds ({problem}). Finished answers are saved. "
                    "Restart the server and run the same command to resume, or increase regenerate.server.patience."
                )
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _alive(self, client: httpx.AsyncClient) -> bool:
        try:
            return (await client.get(f"{self.url}/models")).status_code < 500
        except httpx.TransportError:
            return False

    def _raise_if_final(self, status: int, problem: str) -> None:
        if status in (401, 403, 404, 405):
            raise self._rejection_error(problem)
        if status < 500 and status not in (408, 425, 429):
            raise BadRecord(problem)

    def _rejection_error(self, problem: str) -> UserError:
        return UserError(
            f"{self.url} is rejecting requests ({problem}). Check regenerate.server.url, .model, .key_file and .extra."
        )


class IncompleteReply(Exception):
    """An incomplete or malformed reply, e.g. from a server stopped during generation. The request is retried."""


def _read(reply: Any) -> tuple[dict[str, str], bool, int] | BadRecord:
    """Parse a reply into (message, is complete, token count), or return a BadRecord if a retry cannot help.

    Raises:
        IncompleteReply: the reply is incomplete or malformed, and the request should be retried.
    """
    try:
        choice = reply["choices"][0]
        answer, ending = choice["message"], choice.get("finish_reason")
        message = {"content": answer.get("content") or ""}
        # Some servers return the reasoning separately; chat templates expect it in `reasoning_content`.
        if reasoning := answer.get("reasoning_content") or answer.get("reasoning"):
            message["reasoning_content"] = reasoning
        tokens = (reply.get("usage") or {}).get("completion_tokens") or 0
        "".join(message.values()).encode("utf-8")
    except UnicodeEncodeError:
        return BadRecord("the answer contains a lone surrogate, which is not valid Unicode")
    except (LookupError, TypeError, AttributeError) as error:
        raise IncompleteReply(f"no answer in the reply ({type(error).__name__}: {error})") from error
    if ending in ("tool_calls", "function_call", "content_filter"):
        return BadRecord(f"the server ended the answer with finish_reason={ending!r}")
    if ending not in ("stop", "length"):  # e.g. "abort": generation was interrupted
        raise IncompleteReply(f"finish_reason={ending!r}")
    return message, ending == "stop", tokens


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError as error:
        raise IncompleteReply(f"invalid JSON ({error})") from error
