"""What a chat template reads: an argument that it does not read changes nothing."""

from collections.abc import Callable, Collection
from difflib import get_close_matches
from inspect import signature
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from transformers.utils.chat_template_utils import render_jinja_template

from data.errors import UserError

FOR_USERS = {"tools", "documents"}  # arguments of transformers' rendering that a template may read
# Arguments of the rendering that are set for every conversation.
SET_HERE = {"messages", *signature(render_jinja_template).parameters} - FOR_USERS - {"kwargs"}
FUNCTIONS = ("raise_exception", "strftime_now")  # that transformers gives to templates


class Generation(Extension):
    """`{% generation %}`, which transformers adds to Jinja: for reading a template, its content alone."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def variables_read(template: str) -> set[str] | None:
    """The variables that a chat template reads; None if it is no valid template, which rendering will report."""
    environment = Environment(extensions=[Generation, "jinja2.ext.loopcontrols"])  # noqa: S701  nothing is rendered
    environment.globals |= dict.fromkeys(FUNCTIONS)
    try:
        return find_undeclared_variables(environment.parse(template))
    except TemplateSyntaxError:
        return None


def check_template_kwargs(
    template: str, given: dict[str, Any], overrides: list[str], say: Callable[[str], None], also: Collection[str] = ()
) -> None:
    """Every argument must be one that the chat template reads.

    Args:
        template: the target's chat template.
        given: `data.template_kwargs`.
        overrides: of the command line. What they give must have an effect; what a file of conf/ gives may be for
            another target, and is a warning unless it looks misspelt.
        say: prints a warning.
        also: variables that are always set, such as the special tokens: no suggestions.

    Raises:
        UserError: an argument is set here, looks misspelt, or was given on the command line without effect.
    """
    if taken := sorted(given.keys() & SET_HERE):
        raise UserError(f"data.template_kwargs.{taken[0]}: set for every conversation; leave it out.")
    read = variables_read(template)
    if read is None:
        return
    offered = sorted(read - SET_HERE - set(also))
    typed = [override.partition("=") for override in overrides if "data.template_kwargs" in override.partition("=")[0]]
    for name in sorted(given.keys() - read):
        close = get_close_matches(name, offered, n=1)
        text = f"data.template_kwargs.{name} has no effect: the target's chat template does not read it"
        text += f", but {', '.join(offered)}." if offered else ", nor any other argument."
        if close:
            raise UserError(f"{text} Did you mean {close[0]}?")
        if any(name in key or key.endswith("template_kwargs") and name in value for key, _, value in typed):
            raise UserError(f"{text} Leave it out.")
        say(f"warning: {text}")
