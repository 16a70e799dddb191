"""Finds out how the text of messages may affect the text that a chat template writes around them.

The static analysis follows the messages and their contents through the expressions of a template. Contents may be
written, stripped, tested for their type, and searched for or compared with literals, such as the switch `/no_think` or
`</think>`. Any other use, such as their length or a slice, may change the text around messages in unknown ways.
"""

from collections import defaultdict
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property, partial
from typing import Any

from jinja2 import nodes
from jinja2.meta import find_undeclared_variables

from data.sources.tags import CLOSED

SAME = {"trim", "strip", "lstrip", "rstrip", "string", "safe", "default", "d", "lower", "upper", "replace"}
SAME |= {"removeprefix", "removesuffix"}  # string methods and filters that return the content itself
PIECES = {"split", "rsplit", "partition", "rpartition"}
CONSTANT = {"startswith", "endswith", "find", "rfind", "index", "rindex", "count"}  # if the text lacks the argument
SEARCHES = PIECES | CONSTANT | {"replace", "removeprefix", "removesuffix"}  # for their first argument
JOINING = {"tojson", "indent"}  # filters whose result contains the content
LISTING = {"list", "first", "last", "reverse", "selectattr", "rejectattr", "default"}  # filters of messages
SIZES = {"length", "count"}
TYPES = {"string", "defined", "undefined", "none", "mapping", "iterable", "sequence", "boolean", "number", "callable"}
ENDS = ("</", "[/", "◁/")  # one of them begins each closing tag
FIELDS = {"content", "text"}  # of a message and of a part of its content


class Unclear(Exception):
    """Raised for a use of a content that may change the text around messages in unknown ways."""


class Kind(IntEnum):
    """Dependence of an expression's value on the contents of messages. A greater one is the more dependent."""

    CLEAR = 0  # independent
    MESSAGES = 1  # messages, or a message
    PIECES = 2  # list of a single content, as split at a literal that it lacks
    TEXT = 3  # content of a message
    JOINED = 4  # contains a content


@dataclass(frozen=True)
class Switches:
    """Properties of contents that may change the text around messages."""

    texts: frozenset[str]  # literals that the template searches contents for or compares them with
    equality: bool  # whether the template compares messages with one another

    @cached_property
    def lower(self) -> frozenset[str]:
        """The literals in lower case: templates may ignore the case of contents."""
        return frozenset(text.lower() for text in self.texts)

    def found_in(self, content: str) -> bool:
        """Return whether a content contains one of the literals, in any case, or a tag that closes reasoning."""
        if any(end in content for end in ENDS) and CLOSED.search(content):
            return True
        content = content.lower()
        return any(text in content for text in self.lower)


def find_switches(template: nodes.Template) -> Switches | None:
    """Return the properties of contents that may change the text that a chat template writes around messages.

    Return None if the template uses contents in other ways that may change that text.
    """
    analysis = _Analysis(template)
    try:
        before = None
        while before != analysis.kinds:  # kinds only grow
            before = dict(analysis.kinds)
            analysis.visit(template)
    except Unclear:
        return None
    return Switches(frozenset(analysis.found - {""}), analysis.equality)


class _Analysis:
    """Kinds of a template's variables, regardless of the order of assignments and of scopes."""

    def __init__(self, template: nodes.Template) -> None:
        self.kinds: dict[str, Kind] = {"messages": Kind.MESSAGES}
        self.found: set[str] = set()
        self.equality = False
        self.macros = {macro.name: macro for macro in template.find_all(nodes.Macro)}
        self.assigned: dict[str, list[nodes.Node]] = defaultdict(list)
        for node in template.find_all(nodes.Assign):
            self.assigned[_name(node.target)].append(node.node)
        for call in template.find_all(nodes.Call):
            for keyword in call.kwargs:  # of namespace()
                self.assigned[f".{keyword.key}"].append(keyword.value)
        self.unknown = find_undeclared_variables(template)  # variables that have other values as well
        others: list[nodes.Node] = [node.target for node in template.find_all(nodes.For)]
        others += [node.target for node in template.find_all(nodes.AssignBlock)]
        others += [target for node in template.find_all(nodes.With) for target in node.targets]
        others += [node.target for node in template.find_all(nodes.Assign) if isinstance(node.target, nodes.Tuple)]
        others += [parameter for macro in self.macros.values() for parameter in macro.args]
        for target in others:
            self.unknown |= {_name(node) for node in (target, *target.find_all(nodes.Name))}

    def visit(self, node: nodes.Node) -> Kind:
        """Return the kind of an expression, or of what a statement writes."""
        method = getattr(self, f"_{type(node).__name__.lower()}", None)
        if method is not None:
            return method(node)
        kinds = [self.visit(child) for child in node.iter_child_nodes()]
        if isinstance(node, nodes.Stmt | nodes.Template | nodes.Keyword):
            return max(kinds, default=Kind.CLEAR)
        if any(kinds):
            raise Unclear
        return Kind.CLEAR

    def _bind(self, target: nodes.Node, kind: Kind) -> None:
        """Assign a kind to a variable, a field of a namespace, or each variable of a tuple."""
        if isinstance(target, nodes.Tuple):
            for item in target.items:
                self._bind(item, kind)
            return
        self.kinds[_name(target)] = max(kind, self.kinds.get(_name(target), Kind.CLEAR))

    def _assign(self, node: nodes.Assign) -> Kind:
        if isinstance(node.target, nodes.Tuple) and isinstance(node.node, nodes.Tuple):
            for target, value in zip(node.target.items, node.node.items, strict=False):
                self._bind(target, self.visit(value))
        else:
            kind = self.visit(node.node)
            self._bind(node.target, _item(kind) if isinstance(node.target, nodes.Tuple) else kind)
        return Kind.CLEAR

    def _assignblock(self, node: nodes.AssignBlock) -> Kind:
        self._bind(node.target, max(map(self.visit, node.body), default=Kind.CLEAR) and Kind.JOINED)
        return Kind.CLEAR

    def _for(self, node: nodes.For) -> Kind:
        self._bind(node.target, _item(self.visit(node.iter)))
        return max(map(self.visit, [*([node.test] if node.test else []), *node.body, *node.else_]), default=Kind.CLEAR)

    def _with(self, node: nodes.With) -> Kind:
        for target, value in zip(node.targets, node.values, strict=True):
            self._bind(target, self.visit(value))
        return max(map(self.visit, node.body), default=Kind.CLEAR)

    def _macro(self, node: nodes.Macro) -> Kind:
        self._bind(nodes.Name(f"{node.name}()", "store"), max(map(self.visit, node.body), default=Kind.CLEAR))
        return Kind.CLEAR

    def _name(self, node: nodes.Name) -> Kind:
        return self.kinds.get(node.name, Kind.CLEAR)

    def _getattr(self, node: nodes.Getattr) -> Kind:
        kind = self.visit(node.node)
        if kind >= Kind.TEXT and hasattr(str, node.attr):  # a method that is called elsewhere
            raise Unclear
        return self._field(kind, node.attr)

    def _getitem(self, node: nodes.Getitem) -> Kind:
        kind = self.visit(node.node)
        if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
            return self._field(kind, node.arg.value)
        if self.visit(node.arg):
            raise Unclear
        if kind >= Kind.TEXT:
            raise Unclear
        return kind if isinstance(node.arg, nodes.Slice) else _item(kind)

    def _field(self, kind: Kind, name: str) -> Kind:
        if name in FIELDS:
            return Kind.TEXT
        return self.kinds.get(f".{name}", Kind.CLEAR)  # of a namespace

    def _compare(self, node: Any) -> Kind:
        operands = [node.expr, *(op.expr for op in node.ops)]
        if _is_size(node.expr) and len(operands) == 2 and _is_zero(operands[1]):
            self.visit(node.expr.node)  # a content is never empty
            return Kind.CLEAR
        kinds, op = [self.visit(operand) for operand in operands], node.ops[0].op
        if not any(kinds):
            return Kind.CLEAR
        if kinds == [Kind.MESSAGES] * 2 and op in ("eq", "ne"):
            self.equality = True
            return Kind.CLEAR
        if len(operands) != 2 or all(kinds) or max(kinds) == Kind.JOINED or op not in ("eq", "ne", "in", "notin"):
            raise Unclear
        if max(kinds) == Kind.MESSAGES and (op in ("eq", "ne") or kinds[0]):
            raise Unclear
        self._search(operands[0] if kinds[1] else operands[1], max(kinds))
        return Kind.CLEAR

    def _search(self, node: nodes.Node, kind: Kind) -> None:
        """Add the literals that an expression may be. In messages, those that may be keys are none."""
        found = self._literals(node, ())
        if found is None:
            raise Unclear
        self.found |= {text for text in found if kind > Kind.MESSAGES or not text.isidentifier()}

    def _literals(self, node: nodes.Node, seen: tuple[str, ...]) -> set[str] | None:
        options: list[nodes.Node]
        if isinstance(node, nodes.Name | nodes.Getattr):
            name = _name(node)
            if name in self.unknown or name not in self.assigned:
                return None
            options = [] if name in seen else self.assigned[name]
            seen = (*seen, name)
        elif isinstance(node, nodes.CondExpr):
            options = [node.expr1, *([node.expr2] if node.expr2 else [])]
        elif isinstance(node, nodes.List | nodes.Tuple):
            options = list(node.items)
        else:
            try:
                value = node.as_const() if isinstance(node, nodes.Expr) else None
            except nodes.Impossible:
                return None
            values = value if isinstance(value, list | tuple | dict) else [value]
            return {text for text in values if isinstance(text, str)}
        literals = [self._literals(option, seen) for option in options]
        return None if None in literals else set().union(*(texts for texts in literals if texts))

    def _call(self, node: nodes.Call) -> Kind:
        arguments = [*node.args, *(keyword.value for keyword in node.kwargs)]
        if isinstance(node.node, nodes.Name):
            return self._function(node, node.node.name)
        if not isinstance(node.node, nodes.Getattr):
            raise Unclear
        kind = self.visit(node.node.node)
        if node.node.attr == "get" and arguments and isinstance(arguments[0], nodes.Const):
            return self._field(kind, arguments[0].value)
        if node.node.attr in ("keys", "items", "values") and kind <= Kind.MESSAGES:
            return kind
        return self._applied(node.node.attr, kind, arguments)

    def _function(self, node: nodes.Call, name: str) -> Kind:
        kinds = [self.visit(argument) for argument in node.args]
        named = {keyword.key: self.visit(keyword.value) for keyword in node.kwargs}
        if name == "namespace":
            for key, kind in named.items():
                self._bind(nodes.NSRef("", key), kind)
            return Kind.CLEAR
        if name == "raise_exception":
            return Kind.CLEAR
        if name not in self.macros:
            if any([*kinds, *named.values()]):
                raise Unclear
            return Kind.CLEAR
        for parameter, kind in zip(self.macros[name].args, kinds, strict=False):
            self._bind(parameter, kind)
        for key, kind in named.items():
            self._bind(nodes.Name(key, "param"), kind)
        return self.kinds.get(f"{name}()", Kind.CLEAR)

    def _filter(self, node: nodes.Filter) -> Kind:
        if node.node is None:  # of a filter block
            return Kind.CLEAR
        return self._applied(node.name, self.visit(node.node), [*node.args, *(key.value for key in node.kwargs)])

    def _filterblock(self, node: nodes.FilterBlock) -> Kind:
        return max(map(self.visit, node.body), default=Kind.CLEAR) and Kind.JOINED

    def _applied(self, name: str, kind: Kind, arguments: list[nodes.Expr]) -> Kind:
        """Return the kind of a filter's or a method's result."""
        given = [self.visit(argument) for argument in arguments]
        if kind == Kind.CLEAR and name in ("default", "d"):
            return max(given, default=Kind.CLEAR)
        fields = [argument for argument in arguments if isinstance(argument, nodes.Const) and argument.value in FIELDS]
        if any(given) or (fields and kind <= Kind.MESSAGES):
            raise Unclear
        if kind == Kind.CLEAR:
            return kind
        if name in JOINING or (name in SAME and kind == Kind.JOINED and name not in SEARCHES):
            return Kind.JOINED
        return {Kind.MESSAGES: self._of_messages, Kind.PIECES: self._of_pieces}.get(
            kind, partial(self._of_text, arguments)
        )(name, kind)

    def _of_messages(self, name: str, kind: Kind) -> Kind:
        if name in SIZES:
            return Kind.CLEAR
        if name in LISTING:
            return kind
        raise Unclear

    def _of_pieces(self, name: str, kind: Kind) -> Kind:
        if name in SIZES:
            return Kind.CLEAR
        if name in ("first", "last", "join"):
            return Kind.TEXT
        if name in ("list", "reverse"):
            return kind
        raise Unclear

    def _of_text(self, arguments: list[nodes.Expr], name: str, kind: Kind) -> Kind:
        if name in SEARCHES and kind == Kind.TEXT and arguments:
            self._search(arguments[0], kind)
        elif name not in SAME or name in SEARCHES:
            raise Unclear
        return Kind.PIECES if name in PIECES else Kind.CLEAR if name in CONSTANT else kind

    def _test(self, node: nodes.Test) -> Kind:
        kind = self.visit(node.node)
        if any([kind and node.name not in TYPES, *map(self.visit, node.args)]):
            raise Unclear
        return Kind.CLEAR

    def _not(self, node: nodes.Not) -> Kind:
        self.visit(node.node)  # a content is never empty
        return Kind.CLEAR

    def _if(self, node: nodes.If) -> Kind:
        self.visit(node.test)
        return max(map(self.visit, [*node.body, *node.elif_, *node.else_]), default=Kind.CLEAR)

    def _condexpr(self, node: nodes.CondExpr) -> Kind:
        self.visit(node.test)
        return max(self.visit(node.expr1), self.visit(node.expr2) if node.expr2 else Kind.CLEAR)

    def _or(self, node: nodes.Or | nodes.And) -> Kind:
        return max(self.visit(node.left), self.visit(node.right))

    _and = _or

    def _add(self, node: nodes.Add) -> Kind:
        kind = max(self.visit(node.left), self.visit(node.right))
        return Kind.JOINED if kind > Kind.MESSAGES else kind

    def _concat(self, node: nodes.Concat) -> Kind:
        return max(map(self.visit, node.nodes), default=Kind.CLEAR) and Kind.JOINED

    def _list(self, node: nodes.List | nodes.Tuple) -> Kind:
        kinds = [self.visit(item) for item in node.items]
        if any(kind > Kind.MESSAGES for kind in kinds):
            raise Unclear
        return max(kinds, default=Kind.CLEAR)

    _tuple = _list

    def _dict(self, node: nodes.Dict) -> Kind:
        for pair in node.items:
            key = pair.key.value if isinstance(pair.key, nodes.Const) else None
            if self.visit(pair.value) and key not in FIELDS:
                raise Unclear
        return Kind.CLEAR


def _item(kind: Kind) -> Kind:
    return Kind.TEXT if kind == Kind.PIECES else kind


def _is_zero(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Const) and node.value == 0


def _is_size(node: Any) -> bool:
    return isinstance(node, nodes.Filter) and node.name in SIZES and node.node is not None


def _name(node: nodes.Node) -> str:
    """Return the name of a variable, or that of a namespace's field with a dot before it."""
    if isinstance(node, nodes.Name):
        return node.name
    return f".{node.attr}" if isinstance(node, nodes.NSRef | nodes.Getattr) else ""
