"""Checks the settings `regenerate.server`."""

from pathlib import Path
from typing import Any

import httpx
from omegaconf import DictConfig

from data.errors import UserError


def check_url(url: object) -> None:
    """Check the server's URL.

    Raises:
        UserError: it is not a valid http or https URL.
    """
    try:
        found = httpx.URL(str(url))
        valid = found.scheme in ("http", "https") and bool(found.host) and (found.port or 1) < 2**16 and found.port != 0
    except (httpx.InvalidURL, UnicodeError):
        valid = False
    if not valid:
        raise UserError(
            f"regenerate.server.url={url!r}: expected a URL starting with http:// or https://, with a host and a port "
            "of 1 to 65535. Set it to the address of the server, e.g. http://localhost:8000/v1."
        )


def read_key(key_file: str) -> str:
    """Read the API key.

    Raises:
        UserError: there is no such file, or it does not contain one line of ASCII text.
    """
    setting = f"regenerate.server.key_file={key_file!r}"
    if not Path(key_file).is_file():
        raise UserError(f"{setting}: no such file. Set it to an existing file or null.")
    key = Path(key_file).read_bytes().strip()
    if not key or not key.isascii() or not key.decode().isprintable():
        raise UserError(f"{setting}: expected one line of ASCII text. Write the server's API key into the file.")
    return key.decode()


def token_limit(request: dict[str, Any]) -> int | None:
    """Return the token limit of a request; None if it has none, such as llama.cpp's -1."""
    given = [request.get(field) for field in ("max_tokens", "max_completion_tokens")]
    return min((limit for limit in given if type(limit) is int and limit > 0), default=None)


def stop_strings(request: dict[str, Any]) -> tuple[str, ...]:
    """Return the strings at which the server cuts an answer.

    Raises:
        UserError: they are neither a string nor a list of strings.
    """
    given = request.get("stop") or []
    strings = [given] if isinstance(given, str) else given
    if not isinstance(strings, list | tuple) or not all(isinstance(string, str) for string in strings):
        raise UserError(f"regenerate.server.extra.stop={given!r}: expected a string or a list of strings.")
    return tuple(strings)


def check_server(config: DictConfig) -> None:
    """Check the server's URL, model and API key.

    Raises:
        UserError: a setting is invalid.
    """
    server = config.regenerate.server
    if config.regenerate.backend == "server":
        check_url(server.url)
        if server.model is None:
            raise UserError("regenerate.server.model=null: set it to the target's model name on the server.")
    if server.key_file is not None:
        read_key(server.key_file)
