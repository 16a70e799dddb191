"""Generation backend for servers with an OpenAI-compatible API."""

import asyncio
import random
import re
import time
from collections.abc import Iterable, Iterator
from typing import Any

import httpx

from data.errors import BadRecord, UserError
from data.preprocess.chat_template import ChatEncoder
from data.regenerate.conversation import REFUSED, OnFinish, OnTokens, Sample, Sampling, derive_seed
from data.regenerate.prompt_check import PromptCheck
from data.regenerate.server_reply import ID_FIELDS, IncompleteReply, Reply, UnknownReply, read_reply, request_body
from data.regenerate.server_settings import read_key
from data.sources.kinds import OPENED
from data.sources.records import Conversation, Message
from data.sources.tags import OPENING
from data.terminal import say

MAX_REJECTIONS = 20  # consecutive rejections after which the server is probed, or, without any answer, given up
MAX_FAILURES = 6  # failed attempts (HTTP 5xx, broken connection, unusable reply) before the server is probed
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 20.0  # seconds between retries, exponential backoff
PROBE = {"messages": [{"role": "user", "content": "Hi"}]}  # shows whether the server answers any question
FINAL = (401, 402, 403, 404, 405)  # HTTP statuses that concern every request


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
        self.headers = {"Authorization": f"Bearer {read_key(key_file)}"} if key_file else {}
        self.unavailable_since: float | None = None
        self.answered = False
        self.rejected: list[Sample] = []
        self.open = 0  # samples without an answer, to be asked again in a later run
        self.id_fields = 0  # index into ID_FIELDS of what the server is asked for
        self.returns_ids = False
        self.rewrites_tools = False  # whether the server's prompts with tools differ from the encoder's

    def run(
        self, samples: Iterable[Sample], on_finish: OnFinish, *, answered_before: bool, on_tokens: OnTokens
    ) -> None:
        """Answer every question in every sample, with up to `in_flight` concurrent requests.

        Rejected samples are finished only if the server answers other questions, in this run or in an earlier one
        (`answered_before`): a rejection may mean that the settings are invalid for every request, or that a quota is
        used up. Samples whose requests fail repeatedly while the server answers others are not finished.

        Raises:
            UserError: the server is unreachable, rejects every request, or uses another chat template.
        """
        self.answered, self.rejected, self.open = answered_before, [], 0
        try:
            asyncio.run(self._all(iter(samples), on_finish, on_tokens))
        except BaseExceptionGroup as errors:
            user_errors, _ = errors.split(UserError)
            raise (user_errors or errors).exceptions[0] from None

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
            started = [
                workers.create_task(self._worker(client, samples, on_finish, on_tokens)) for _ in range(self.in_flight)
            ]
            await asyncio.gather(*started)
            await self._finish_rejected(client, on_finish)

    async def _worker(
        self, client: httpx.AsyncClient, samples: Iterator[Sample], on_finish: OnFinish, on_tokens: OnTokens
    ) -> None:
        for sample in samples:  # iterator shared by all workers
            rejected = False
            try:
                while sample.outcome is None:
                    rejected = not await self._answer(client, sample, on_tokens)
            except Unanswered as error:
                self.open += 1
                say(f"warning: {sample.id}: {error}")
                continue
            if rejected:
                self.rejected.append(sample)
                if len(self.rejected) >= MAX_REJECTIONS:
                    await self._finish_rejected(client, on_finish)
                continue
            if self._trusted:
                self._flush(on_finish)
            on_finish(sample)

    async def _finish_rejected(self, client: httpx.AsyncClient, on_finish: OnFinish) -> None:
        """Finish rejected samples if the server answers another question.

        Raises:
            UserError: it does not, or has not answered any sample.
        """
        if self.rejected and not (self._trusted and await self._alive(client)):
            raise self._rejection_error(str(self.rejected[0].outcome))
        self._flush(on_finish)

    def _flush(self, on_finish: OnFinish) -> None:
        finished, self.rejected = self.rejected, []
        for sample in finished:
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
        except BadRecord as error:
            sample.end(f"{REFUSED}: {error}")
            return not isinstance(error, (Rejected, UnknownReply))
        try:
            self.prompts.check(prompt, reply)
        except BadRecord as error:
            sample.end(f"{REFUSED}: {error}")
            return False
        ids = self._ids(reply)
        message = reply.message if ids or reply.complete else self._cut_in_reasoning(reply.message, prompt)
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
            if not with_tools or self._same_prompt(reply, prompt):
                return reply
            self.rewrites_tools = True
        body = {key: value for key, value in self.request.items() if key != "chat_template_kwargs"}
        try:
            return await self._post(client, "completions", body | {"prompt": prompt, "seed": seed, **ID_FIELDS[0]})
        except Rejected as error:
            problem = "the server's prompt has other tools than the target's template writes, and the server rejects"
            raise Rejected(f"{problem} token ids as the prompt ({error})") from error

    def _same_prompt(self, reply: Reply, prompt: list[int]) -> bool:
        if reply.prompt_ids is not None:
            return reply.prompt_ids == prompt
        return reply.prompt_tokens in (None, len(prompt))

    def _cut_in_reasoning(self, message: Message, prompt: list[int]) -> Message:
        """Return an answer that was cut off in its reasoning as the target wrote it: with the opening tag, as text.

        Unchanged if the answer has other parts, or neither the prompt nor the template has an opening tag.
        """
        reasoning = message.get("reasoning_content")
        if not reasoning or message["content"].strip() or "tool_calls" in message:
            return message
        if OPENED.search(self.encoder.backend.decode(prompt, skip_special_tokens=False)):
            return {"content": reasoning}
        opening = re.search(OPENING, self.encoder.template)
        return {"content": f"{opening[0]}\n{reasoning.lstrip()}"} if opening else message

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
        """Send a request and parse the reply. Retry with backoff while the server is unavailable.

        Raises:
            BadRecord: the server rejects the request, or its reply cannot be used.
            Unanswered: the request fails repeatedly while the server answers another one.
            UserError: the server is unavailable for longer than `patience` seconds, or rejects every request.
        """
        pause, failures = FIRST_PAUSE, 0
        while True:
            try:
                response = await client.post(f"{self.url}/{path}", json=body)
                if response.status_code == 200:
                    return self._read(response)
                problem = f"HTTP {response.status_code}: {response.text:.300}"
                self._raise_if_final(path, response, problem)
                failures += response.status_code >= 500
            except httpx.ConnectError as error:
                problem = f"{type(error).__name__}: {error}"
            except (httpx.HTTPError, IncompleteReply) as error:  # failed after accepting the connection
                problem = f"{type(error).__name__}: {error}"
                failures += 1
            now = time.monotonic()
            self.unavailable_since = self.unavailable_since or now
            impatient = now - self.unavailable_since > self.patience
            # If a request fails repeatedly while the server answers another one, the request itself is the cause.
            if failures and (failures >= MAX_FAILURES or impatient):
                if await self._alive(client):
                    raise Unanswered(f"no answer after {failures} attempts ({problem})")
                failures = 0  # the server was down
            if impatient:
                raise UserError(
                    f"No answer from {self.url} for {self.patience:g} seconds ({problem}). Finished answers are saved. "
                    "Restart the server and run the same command to resume, or increase regenerate.server.patience."
                )
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE)

    def _read(self, response: httpx.Response) -> Reply:
        limit = self.request.get("max_tokens", self.request.get("max_completion_tokens"))
        reply = read_reply(_json(response), self.encoder.token_ids.stop_ids, limit)
        self.unavailable_since = None
        self.answered = self.answered or not isinstance(reply, UnknownReply)
        if isinstance(reply, BadRecord):
            raise reply
        return reply

    async def _alive(self, client: httpx.AsyncClient) -> bool:
        """Return whether the server answers a short question with the same settings."""
        try:
            response = await client.post(f"{self.url}/chat/completions", json=self.request | PROBE)
            if response.status_code == 200:
                self._read(response)
            return response.status_code == 200
        except UnknownReply:
            return False
        except BadRecord:  # an answer, although of no use
            return True
        except (httpx.HTTPError, IncompleteReply):
            return False

    def _raise_if_final(self, path: str, response: httpx.Response, problem: str) -> None:
        status = response.status_code
        if 300 <= status < 400:
            problem = f"HTTP {status}: redirect to {response.headers.get('location', 'an unknown address')}"
        if status < 400 or (status in FINAL and path != "completions"):  # not every server has /completions
            raise self._rejection_error(problem)
        if status < 500 and status not in (408, 425, 429):
            raise Rejected(problem)

    def _rejection_error(self, problem: str) -> UserError:
        if self.prompts.all_differ:
            return self.prompts.error()
        return UserError(
            f"{self.url} is rejecting requests ({problem}). Finished answers are saved. "
            f"Check regenerate.server.url, .model, .key_file and .extra, "
            f"and that regenerate.max_new_tokens={self.sampling.max_new_tokens} leaves room for a prompt in the "
            "server's context length."
        )


class Rejected(BadRecord):
    """Raised if the server rejects a request with an HTTP status of 400 to 499."""


class Unanswered(Exception):
    """Raised if a request fails repeatedly while the server answers others. A later run asks again."""


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError as error:
        raise IncompleteReply(f"invalid JSON ({error})") from error
