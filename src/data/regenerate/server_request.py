"""Sends a single request to a server and sorts its failures: which concern the request, and which the server."""

import random
from collections.abc import Iterator
from typing import Any

import httpx

from data.errors import BadRecord
from data.regenerate.server_reply import IncompleteReply, UnknownReply

FINAL = (401, 402, 403, 404, 405)  # HTTP statuses that concern every request
RETRIED = (408, 425, 429)  # and all from 500


class Rejected(BadRecord):
    """Raised if the server rejects a request with an HTTP status of 400 to 499."""


class RejectsAll(Exception):
    """Raised if the server rejects a request for a reason that concerns every request."""


class Failed(Exception):
    """Raised for a failure of the server. The request is retried."""

    def __init__(self, problem: str, *, accepted: bool) -> None:
        """Store the problem, and whether the server accepted the connection and started on the request."""
        super().__init__(problem)
        self.accepted = accepted


async def send(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> Any:
    """Send a request once and return the decoded JSON of the reply.

    Raises:
        Rejected: the server rejects the request.
        RejectsAll: the server rejects every request.
        Failed: the server is unavailable, or the reply is no JSON.
        UnknownReply: the JSON is nested too deeply.
    """
    try:
        response = await client.post(url, json=body)
    except httpx.HTTPError as error:
        accepted = not isinstance(error, httpx.ConnectError)
        raise Failed(f"{type(error).__name__}: {error}", accepted=accepted) from error
    status = response.status_code
    if status == 200:
        return _json(response)
    problem = f"HTTP {status}: {response.text:.300}"
    if 300 <= status < 400:
        problem = f"HTTP {status}: redirect to {response.headers.get('location', 'an unknown address')}"
    # Not every server has /completions.
    if status < 400 or (status in FINAL and url.endswith("/chat/completions")):
        raise RejectsAll(problem)
    if status < 500 and status not in RETRIED:
        raise Rejected(problem)
    raise Failed(problem, accepted=status >= 500)


def pauses(first: float, longest: float) -> Iterator[float]:
    """Yield the seconds to wait between retries: exponential backoff with jitter."""
    while True:
        yield first * random.uniform(0.5, 1.0)
        first = min(2 * first, longest)


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except RecursionError:
        raise UnknownReply("the reply's JSON is nested too deeply") from None
    except ValueError as error:
        raise Failed(f"{IncompleteReply.__name__}: invalid JSON ({error})", accepted=True) from error
