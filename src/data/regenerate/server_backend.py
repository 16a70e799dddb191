"""Generation backend for servers with an OpenAI-compatible API."""

import asyncio
import random
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx

from data.errors import BadRecord, UserError
from data.preprocess.chat_template import ChatEncoder
from data.regenerate.conversation import REFUSED, OnFinish, OnTokens, Sample, Sampling, derive_seed
from data.regenerate.prompt_check import PromptCheck
from data.regenerate.server_reply import ID_FIELDS, IncompleteReply, Reply, read_reply, request_body
from data.sources.records import Conversation

FIRST_REJECTIONS = 20  # give up after this many rejections if no request has been answered yet
MAX_FAILURES = 6  # failed attempts (HTTP 500, broken connection, unusable reply) before a request is dropped
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 20.0  # seconds between retries, exponential backoff


class ServerBackend:
    """Generates answers with an OpenAI-compatible server, e.g. vLLM, SGLang or `transformers serve`."""

    def __init__(
        self, sampling: Sampling, template_kwargs: dict[str, Any], encoder: ChatEncoder,
        *, url: str, model: str, in_flight: int, patience: float, timeout: float, key_file: str | None,
        extra: dict[str, Any],
    ) -> None:  # fmt: skip
        """Prepare the requests.

        Args:
            encoder: the target's encoder, to compare the server's prompts with those of training.
            url, model, in_flight, patience, timeout, key_file, extra: the settings `regenerate.server`.
        """
        self.sampling, self.url, self.in_flight, self.patience = sampling, url.rstrip("/"), in_flight, patience
        self.timeout, self.encoder, self.prompts = timeout, encoder, PromptCheck(encoder, url)
        self.request = {
            "model": model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            **({"chat_template_kwargs": template_kwargs} if template_kwargs else {}),
            **extra,
        }
        self.request = {key: value for key, value in self.request.items() if value is not None}
        self.headers = {"Authorization": f"Bearer {Path(key_file).read_text().strip()}"} if key_file else {}
        self.unavailable_since: float | None = None
        self.answered = False
        self.rejected: list[Sample] = []
        self.id_fields = 0  # index into ID_FIELDS of what the server is asked for
        self.returns_ids = False
        self.rewrites_tools = False  # whether the server's prompts with tools differ from the encoder's

    def run(
        self, samples: Iterable[Sample], on_finish: OnFinish, *, answered_before: bool, on_tokens: OnTokens
    ) -> None:
        """Answer every question in every sample, with up to `in_flight` concurrent requests.

        Rejected samples are held back until the server has answered a request, in this run or in an earlier one
        (`answered_before`). Until then, a rejection may mean that the settings are invalid for every request.

        Raises:
            UserError: the server is unreachable, rejects every request, or uses another chat template.
        """
        self.answered, self.rejected = answered_before, []
        try:
            asyncio.run(self._all(iter(samples), on_finish, on_tokens))
        except* UserError as errors:
            raise errors.exceptions[0] from None
        if self.rejected:
            raise self._rejection_error(str(self.rejected[0].outcome))

    @property
    def _trusted(self) -> bool:
        """Whether the server has shown that it can answer, from the same prompts as in training."""
        return self.answered and not self.prompts.all_differ

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
            rejected = False
            while sample.outcome is None:
                rejected = not await self._answer(client, sample, on_tokens)
            if rejected and not self._trusted:
                self.rejected.append(sample)
                if len(self.rejected) >= FIRST_REJECTIONS:
                    raise self._rejection_error(str(sample.outcome))
                continue
            if self._trusted:
                for held_back in self.rejected:
                    on_finish(held_back)
                self.rejected = []
            on_finish(sample)

    async def _answer(self, client: httpx.AsyncClient, sample: Sample, on_tokens: OnTokens) -> bool:
        """Ask the sample's next question and store the answer. Return whether the server accepted the request."""
        seed = derive_seed(self.sampling.seed, f"{sample.id}/{len(sample.messages)}")
        conversation = sample.ask()
        try:
            prompt = self.encoder.prompt(conversation)
        except BadRecord as error:  # training would refuse it as well
            sample.end(f"{REFUSED}: {error}")
            return True
        try:
            reply = await self._reply(client, conversation, prompt, seed)
            self.prompts.check(prompt, reply)
        except BadRecord as error:
            sample.end(f"{REFUSED}: {error}")
            return False
        ids = self._ids(reply)
        message = reply.message
        if ids and "reasoning_content" in message and not message["content"].strip() and "tool_calls" not in message:
            message = {"content": self.encoder.backend.decode(ids)}  # a parser found no end of the reasoning
        sample.answer(message, ids, reply.complete, reply.tokens, self.sampling)
        on_tokens(reply.tokens)
        return True

    async def _reply(
        self, client: httpx.AsyncClient, conversation: Conversation, prompt: list[int], seed: int
    ) -> Reply:
        """Request an answer.

        Servers may rewrite tools before they render them: vLLM adds `description: null` and drops unknown keys. In that
        case, the prompt is sent as token ids.
        """
        with_tools = conversation.tools or any("tool_calls" in message for message in conversation.messages)
        if not (with_tools and self.rewrites_tools):
            reply = await self._ask(client, conversation, seed)
            if not with_tools or reply.prompt_ids in (None, prompt):
                return reply
            self.rewrites_tools = True
        body = {key: value for key, value in self.request.items() if key != "chat_template_kwargs"}
        return await self._post(client, "completions", body | {"prompt": prompt, "seed": seed, **ID_FIELDS[0]})

    def _ids(self, reply: Reply) -> list[int] | None:
        """Return the answer's token ids, or None if they are unknown or of more than the text, e.g. a stop string."""
        if reply.token_ids is None:
            return None
        try:
            self.encoder.token_ids.check(reply.message, reply.token_ids)
        except BadRecord:
            return None
        return reply.token_ids

    async def _ask(self, client: httpx.AsyncClient, conversation: Conversation, seed: int) -> Reply:
        """Request an answer. If the server rejects the request for token ids, try without it.

        Raises:
            BadRecord: the server cannot answer this request.
            UserError: the server rejects every request, or is unavailable for longer than `patience` seconds.
        """
        body, level = {**self.request, **request_body(conversation), "seed": seed}, self.id_fields
        try:
            reply = await self._post(client, "chat/completions", ID_FIELDS[level] | body)
        except Rejected:
            if self.returns_ids or not ID_FIELDS[level]:
                raise
            reply = await self._post(client, "chat/completions", body)
            self.id_fields = len(ID_FIELDS) - 1
            return reply
        if reply.token_ids is not None:
            self.returns_ids = True
        elif not self.returns_ids:
            self.id_fields = max(self.id_fields, min(level + 1, len(ID_FIELDS) - 1))
        return reply

    async def _post(self, client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Reply:
        """Send a request and parse the reply. Retry with backoff while the server is unavailable."""
        pause, failures = FIRST_PAUSE, 0
        while True:
            try:
                response = await client.post(f"{self.url}/{path}", json=body)
                if response.status_code == 200:
                    reply = read_reply(_json(response), self.encoder.token_ids.stop_ids)
                    self.unavailable_since, self.answered = None, True
                    if isinstance(reply, BadRecord):
                        raise reply
                    return reply
                problem = f"HTTP {response.status_code}: {response.text:.300}"
                self._raise_if_final(response.status_code, problem)
                failures += response.status_code == 500
            except httpx.ConnectError as error:
                problem = f"{type(error).__name__}: {error}"
            except (httpx.TransportError, IncompleteReply) as error:  # failed after accepting the connection
                problem = f"{type(error).__name__}: {error}"
                failures += 1
            # If a request fails repeatedly while the server is alive, the request itself is the cause.
            if failures >= MAX_FAILURES:
                if await self._alive(client):
                    raise BadRecord(f"no answer after {failures} attempts ({problem})")
                failures = 0  # the server was down
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
            raise Rejected(problem)

    def _rejection_error(self, problem: str) -> UserError:
        if self.prompts.all_differ:
            return self.prompts.error()
        return UserError(
            f"{self.url} is rejecting requests ({problem}). Check regenerate.server.url, .model, .key_file and .extra, "
            f"and that regenerate.max_new_tokens={self.sampling.max_new_tokens} leaves room for a prompt in the "
            "server's context length."
        )


class Rejected(BadRecord):
    """Raised if the server rejects a request with an HTTP status of 400 to 499."""


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError as error:
        raise IncompleteReply(f"invalid JSON ({error})") from error
