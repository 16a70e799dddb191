"""Validates chat template arguments: an argument that the template does not read has no effect."""

from collections.abc import Callable, Collection
from contextlib import suppress
from datetime import datetime
from difflib import get_close_matches
from inspect import signature
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from transformers.utils.chat_template_utils import render_jinja_template

from data.errors import BadRecord, UserError
from data.preprocess.switches import Switches, find_switches
from data.preprocess.tool_calls import SAMPLE, SAMPLE_TOOL

USER_ARGUMENTS = {"tools", "documents"}  # rendering arguments of transformers that users may set
# Rendering arguments that this project sets for every conversation.
RESERVED = {"messages", *signature(render_jinja_template).parameters} - USER_ARGUMENTS - {"kwargs"}
DAYS = (datetime(2001, 2, 3, 4, 5, 6), datetime(2012, 11, 10, 19, 38, 47))  # no field is the same
FUNCTIONS = ("raise_exception", "strftime_now")  # provided to templates by transformers


class Generation(Extension):
    """Parses the `{% generation %}` tag of transformers as just its body, which is enough for static analysis."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def variables_read(template: str) -> set[str] | None:
    """Return the variables that a chat template reads, or None if the template is invalid (rendering fails)."""
    parsed = _parsed(template)
    return None if parsed is None else find_undeclared_variables(parsed)


def template_switches(template: str) -> Switches | None:
    """Return the properties of contents that may change the text around messages, or None if they are unknown."""
    parsed = _parsed(template)
    return None if parsed is None else find_switches(parsed)


def names_role(template: str, role: str) -> bool:
    """Return whether a chat template names a role, i.e. has its name as a literal."""
    parsed = _parsed(template)
    return parsed is not None and any(const.value == role for const in parsed.find_all(nodes.Const))


def _parsed(template: str) -> nodes.Template | None:
    environment = Environment(extensions=[Generation, "jinja2.ext.loopcontrols"])  # noqa: S701  nothing is rendered
    environment.globals |= dict.fromkeys(FUNCTIONS)
    try:
        return environment.parse(template)
    except TemplateSyntaxError:
        return None


def check_reserved(given: Collection[str]) -> None:
    """Check that no argument is one that this project passes itself.

    Raises:
        UserError: an argument is reserved.
    """
    if reserved := sorted(RESERVED & set(given)):
        raise UserError(f"data.template_kwargs.{reserved[0]} is reserved: the pipeline sets it. Remove it.")


def check_template_kwargs(
    template: str, given: dict[str, Any], overrides: list[str], warn: Callable[[str], None], also: Collection[str] = ()
) -> None:
    """Check that the chat template reads every argument.

    Args:
        template: the target's chat template.
        given: `data.template_kwargs`.
        overrides: command-line overrides. An unread argument set here is an error. One set in a conf/ file may be meant
            for a different target, so it only causes a warning unless it looks like a typo.
        warn: called with the text of a warning.
        also: variables that are always set, e.g. special tokens; excluded from the suggestions.

    Raises:
        UserError: an argument is reserved, looks like a typo, or has no effect but was given on the command line.
    """
    check_reserved(given)
    read = variables_read(template)
    if read is None:
        return
    offered = sorted(read - RESERVED - set(also))
    typed = [override.partition("=") for override in overrides if "data.template_kwargs" in override.partition("=")[0]]
    for name in sorted(given.keys() - read):
        close = get_close_matches(name, offered, n=1)
        text = f"data.template_kwargs.{name} has no effect: the target's chat template does not read it. "
        text += f"The template reads {', '.join(offered)}." if offered else "The template reads no optional arguments."
        if close:
            raise UserError(f"{text} Did you mean {close[0]}?")
        if any(name in key or key.endswith("template_kwargs") and name in value for key, _, value in typed):
            raise UserError(f"{text} Remove it.")
        warn(f"warning: {text}")


def writes_date(template: str, render: Callable[..., str]) -> bool:
    """Return whether a chat template writes the current date into conversations. An argument may fix the date instead.

    Args:
        template: the text of the template.
        render: renders messages, with or without a generation prompt and with further arguments.
    """
    if "strftime_now" not in template:
        return False
    system, tool = {"role": "system", "content": "Be brief."}, {"type": "function", "function": SAMPLE_TOOL}
    rendered: list[list[str]] = []
    for messages in (SAMPLE[:1], [system, *SAMPLE[:1]], SAMPLE, [system, *SAMPLE]):
        for tools in ({}, {"tools": [tool]}):
            with suppress(BadRecord):
                rendered.append([render(messages, True, **tools, strftime_now=day.strftime) for day in DAYS])
    return not rendered or any(first != second for first, second in rendered)
