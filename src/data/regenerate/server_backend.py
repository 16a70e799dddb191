"""Generation backend for servers with an OpenAI-compatible API."""

import asyncio
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import httpx

from data.errors import BadRecord, UserError
from data.preprocess.chat_template import ChatEncoder
from data.regenerate.conversation import REFUSED, OnFinish, OnTokens, Sample, Sampling, derive_seed
from data.regenerate.prompt_check import PromptCheck
from data.regenerate.server_answer import AnswerReader
from data.regenerate.server_reply import ID_FIELDS, IncompleteReply, Reply, UnknownReply, read_reply, request_body
from data.regenerate.server_request import Failed, Rejected, RejectsAll, pauses, send
from data.regenerate.server_settings import read_key, stop_strings, token_limit
from data.sources.records import Conversation
from data.terminal import say

MAX_REJECTIONS = 20  # consecutive rejections after which the server is probed, or, without any answer, given up
MAX_FIELD_REJECTIONS = 2  # requests answered only without a field for token ids, before the field is left out
MAX_FAILURES = 6  # failed attempts (HTTP 5xx, broken connection, unusable reply) before the server is probed
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 20.0  # seconds between retries, exponential backoff
PROBE = {"messages": [{"role": "user", "content": "Hi"}]}  # shows whether the server answers any question


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
        self.answers = AnswerReader(encoder)
        self.request = {
            "model": model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            **({"chat_template_kwargs": template_kwargs} if template_kwargs else {}),
            **extra,
        }
        self.request = {key: value for key, value in self.request.items() if value is not None}
        self.max_tokens, self.stops = token_limit(self.request), stop_strings(self.request)
        self.headers = {"Authorization": f"Bearer {read_key(key_file)}"} if key_file else {}
        self.unavailable_since: float | None = None
        self.answered = False
        self.rejected: list[tuple[Sample, BadRecord]] = []
        self.open = 0  # samples without an answer, to be asked again in a later run
        self.id_fields = 0  # index into ID_FIELDS of what the server is asked for
        self.field_rejections = 0
        self.returns_ids = False
        self.rewrites_tools = False  # whether the server's prompts with tools differ from the encoder's

    def run(
        self, samples: Iterable[Sample], on_finish: OnFinish, *, answered_before: bool, on_tokens: OnTokens
    ) -> None:
        """Answer every question in every sample, with up to `in_flight` concurrent requests.

        Rejected samples are finished only if the server answers other questions, in this run or in an earlier one
        (`answered_before`): a rejection may mean that the settings are invalid for every request, or that a quota is
        used up. Samples whose requests fail repeatedly, or whose replies have an unknown form, while the server answers
        others are not finished.

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
            error: BadRecord | None = None
            try:
                while sample.outcome is None and error is None:
                    error = await self._answer(client, sample, on_tokens)
            except Unanswered as failure:
                self._leave_open(sample, failure)
                continue
            if error:
                self.rejected.append((sample, error))
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
        rejected = self.rejected
        if not rejected:
            return
        alive = self._trusted and await self._alive_after_retries(client)
        if self.rejected is not rejected:
            return  # another worker got an answer in the meantime and has finished them
        if not alive:
            raise self._rejection_error(rejected[0][1])
        self._flush(on_finish)

    def _flush(self, on_finish: OnFinish) -> None:
        finished, self.rejected = self.rejected, []
        for sample, error in finished:
            if sample.outcome is None:
                self._leave_open(sample, error)
            else:
                on_finish(sample)

    def _leave_open(self, sample: Sample, error: Exception) -> None:
        self.open += 1
        say(f"warning: {sample.id}: {error}")

    async def _answer(self, client: httpx.AsyncClient, sample: Sample, on_tokens: OnTokens) -> BadRecord | None:
        """Ask the sample's next question and store the answer.

        Return the error if the server rejects the request, uses another prompt, or replies in an unknown form. In the
        last case, the sample has no outcome.
        """
        seed = derive_seed(self.sampling.seed, f"{sample.id}/{len(sample.messages)}")
        conversation = sample.ask()
        try:
            prompt = self.encoder.prompt(conversation)
        except BadRecord as error:  # training would refuse it as well
            sample.end(f"{REFUSED}: {error}")
            return None
        try:
            reply = await self._reply(client, conversation, prompt, seed)
        except UnknownReply as error:
            return error
        except BadRecord as error:
            sample.end(f"{REFUSED}: {error}")
            return error if isinstance(error, Rejected) else None
        try:
            self.prompts.check(prompt, reply)
        except BadRecord as error:
            sample.end(f"{REFUSED}: {error}")
            return error
        reply = self.answers.read(reply, prompt)
        length = sample.answer(reply.message, reply.token_ids, reply.complete, reply.tokens, self.sampling)
        if length is not None:
            sample.unverified += not self.answers.verified(reply, length)
        on_tokens(reply.tokens)
        return None

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

    async def _ask(self, client: httpx.AsyncClient, conversation: Conversation, seed: int) -> Reply:
        """Request an answer. If the server rejects it with the field for token ids, try without the field.

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
            self.field_rejections += 1
            if self.field_rejections >= MAX_FIELD_REJECTIONS:
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
        failures, waits = 0, pauses(FIRST_PAUSE, LONGEST_PAUSE)
        while True:
            try:
                return await self._attempt(client, path, body)
            except Failed as error:
                problem = str(error)
                failures += error.accepted
            now = time.monotonic()
            self.unavailable_since = self.unavailable_since or now
            impatient = now - self.unavailable_since > self.patience
            # If a request fails repeatedly while the server answers another one, the request itself is the cause.
            if failures and (failures >= MAX_FAILURES or impatient):
                with suppress(Failed):
                    if await self._alive(client):
                        raise Unanswered(f"no answer after {failures} attempts ({problem})")
                failures = 0  # the server was down
            if impatient:
                raise self._unavailable_error(problem)
            await asyncio.sleep(next(waits))

    async def _attempt(self, client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Reply:
        """Send a request once and parse the reply.

        Raises:
            BadRecord: the server rejects the request, or its reply cannot be used.
            Failed: the server is unavailable, or the reply is incomplete.
            UserError: the server rejects every request.
        """
        try:
            found = await send(client, f"{self.url}/{path}", body)
            reply = read_reply(found, self.encoder.token_ids.stop_ids, self.max_tokens, self.stops)
        except IncompleteReply as error:
            raise Failed(f"{type(error).__name__}: {error}", accepted=True) from error
        except RejectsAll as error:
            raise self._rejection_error(error) from error
        self.unavailable_since = None
        self.answered = self.answered or not isinstance(reply, UnknownReply)
        if isinstance(reply, BadRecord):
            raise reply
        return reply

    async def _alive_after_retries(self, client: httpx.AsyncClient) -> bool:
        """Return whether the server answers a short question, or another worker's question in the meantime.

        Retry with backoff while the server is unavailable.

        Raises:
            UserError: it is unavailable for longer than `patience` seconds, or rejects every request.
        """
        rejected, started, waits = self.rejected, time.monotonic(), pauses(FIRST_PAUSE, LONGEST_PAUSE)
        while True:
            try:
                return await self._alive(client)
            except Failed as error:
                if self.rejected is not rejected:
                    return True
                if time.monotonic() - started > self.patience:
                    raise self._unavailable_error(str(error)) from error
            await asyncio.sleep(next(waits))

    async def _alive(self, client: httpx.AsyncClient) -> bool:
        """Ask a short question once, with the same settings, and return whether the server answers it.

        Raises:
            Failed: the server is unavailable.
            UserError: the server rejects every request.
        """
        try:
            await self._attempt(client, "chat/completions", self.request | PROBE)
        except (Rejected, UnknownReply):
            return False
        except BadRecord:  # an answer, although of no use
            return True
        return True

    def _unavailable_error(self, problem: str) -> UserError:
        return UserError(
            f"No answer from {self.url} for {self.patience:g} seconds ({problem}). Finished answers are saved. "
            "Restart the server and run the same command to resume, or increase regenerate.server.patience."
        )

    def _rejection_error(self, error: Exception) -> UserError:
        if self.prompts.all_differ:
            return self.prompts.error()
        if isinstance(error, UnknownReply):
            return UserError(
                f"{self.url} replies in an unknown form ({error}). Finished answers are saved. Set "
                "regenerate.server.url to a server with OpenAI's API for chat completions, and check .extra."
            )
        return UserError(
            f"{self.url} is rejecting requests ({error}). Finished answers are saved. "
            f"Check regenerate.server.url, .model, .key_file and .extra, "
            f"and that regenerate.max_new_tokens={self.sampling.max_new_tokens} leaves room for a prompt in the "
            "server's context length."
        )


class Unanswered(Exception):
    """Raised if a request fails repeatedly while the server answers others. A later run asks again."""
