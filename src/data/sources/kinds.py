"""Kinds of answers: chat, code, math, tools and reasoning. Acceptance differs between them.

A kind that a record or source declares takes precedence. Otherwise, the first of these rules that holds decides:

1. tools: the conversation has tool schemas, or tool calls up to the answer
2. reasoning: the answer has reasoning in a field, or starts with it, in a block such as `<think>`
3. code: the answer contains a fenced block of code, or several lines of code; or the question contains one or asks for
   code
4. math: the answer contains LaTeX, a `####` result or equations with numbers; or the question contains LaTeX, asks to
   solve or calculate, or asks "how many" or "how much" and gives numbers. Questions of over 1,200 characters, mostly
   pasted texts, do not count
5. chat: none of the above

Questions are matched in English; fences, lines of code, LaTeX and equations in any language.
"""

import re
from typing import Any

from data.errors import UserError
from data.sources.records import Conversation
from data.sources.tags import CLOSING, NAME, OPENING

CHAT, CODE, MATH, TOOLS, REASONING = KINDS = ("chat", "code", "math", "tools", "reasoning")
CATEGORIES = {kind: kind for kind in KINDS}
CATEGORIES |= {"maths": MATH, "mathematics": MATH, "coding": CODE, "programming": CODE}
CATEGORIES |= {"tool": TOOLS, "tool_use": TOOLS, "function_calling": TOOLS, "conversation": CHAT}
LENGTHS = (32, 128, 512, 2048, 8192, 32768)  # limits of the length groups, in tokens
READ = 20_000  # characters of a text that the rules read
TASK = 1200  # characters of the longest question that is read as a math task; longer ones are mostly pasted texts

FENCE = re.compile(r"^ *+(?:```|~~~) *+([\w+#.-]*+)[^\n`]*+\n", re.M)
NOT_CODE = {"", "text", "txt", "plaintext", "plain", "markdown", "md", "latex", "tex", "math", "output", "quote"}
CODE_LINE = re.compile(
    r"^[ \t]*+(?:(?:async )?def \w+\(.*|class \w++.*[:{]|(?:import|from) [\w.]+(?: import .*)?|return\b.*"
    r"|(?:if|elif|for|while|with|try|except|else)\b.*:|#include\b.*|(?:public|private|static|const|let|var|fn|func|fun"
    r"|function)\b.*[;{(].*|@\w+|SELECT\b.* FROM\b.*|</?\w++[^>]{0,200}+>.*|.*[;{]|[})\]]+[;,]?)$",
    re.M,
)
LINE = re.compile(r"^[ \t]*\S", re.M)
PROSE_TAG = re.compile(r"</?(?:p|br|b|i|em|strong|a|u|ul|ol|li|h[1-6]|blockquote)\b[^<>\n]{0,200}>")
LANGUAGES = (
    *("python", "javascript", "java", "typescript", "c++", "c#", "rust", "golang", "sql", "html", "css", "bash"),
    *("shell", "php", "ruby", "kotlin", "swift"),
)
PROGRAMS = ("function", "algorithm", "code", "unit test", "regex", "website", "web page", "program", "script")
LANGUAGE = rf"(?:{'|'.join(map(re.escape, LANGUAGES))})(?![\w+#])"
GAP = r"(?:(?! (?:about|for|of|from|on|with)\b)[^.?!\n]){0,80}?"  # "a story about code" asks for no code
ASKS_CODE = re.compile(
    rf"\b(?:write|implement|create|develop|design|build|generate|complete|provide|make|give|fix|debug|refactor)\b{GAP}"
    r"(?:\b(?:functions?(?! of\b)|algorithm|unit tests?|regex|website(?! \w+s\b)|web page)\b"
    r"|(?<!dress )(?<!zip )(?<!morse )(?<!promo )(?<!discount )\bcode(?= (?:to|for|that|which|in|using|below|above|"
    r"snippets?|examples?)\b|[\s:.,?!]*$|[:.,?!\n])"
    r"|\b(?:an?|the|this|my|simple|small|short|computer|following) (?:program|script)(?= (?:that|to|in|which)\b)"
    rf"|\b{LANGUAGE})|\b(?:in|use|using|with) {LANGUAGE}",
)
LATEX = re.compile(
    r"\\(?:frac|dfrac|sqrt|boxed|sum|int|cdot|times|div|leq?|geq?|neq|pmod|binom|begin\{(?:align|equation|cases|p?matrix))"
    r"|\\\(|\\\[|(?<![\w$])\$[^$\n]{0,80}[\\^_=][^$\n]{0,80}\$"
)
RESULT = re.compile(r"^#### *[-$]?\d", re.M)
EQUATION = re.compile(
    r"(?<!\d)\d[\d.,%)]{0,30} ?(?:[-+*/×÷·^x]|\*\*) ?[$€£(]{0,2}\d[^=\n]{0,40}= ?[$€£-]{0,2}\d"  # 3 + 4 = 7
    r"|\b\d*[a-zA-Z](?:\^?\d)? ?[-+*/] ?(?:\d+[a-zA-Z]?|[a-zA-Z])(?:\^?\d)?\b[^=<>\n]{0,20}[=<>]"  # 2x + 3 = y
)
TASKS = (
    *("solve", "calculate", "compute", "simplif", "factor", "differentiate", "integrate", "prove that", "remainder"),
    *("derivative", "integral", "polynomial", "quadratic", "hypotenuse", "perimeter", "probability", "area of"),
    *("volume of", "value of", "f(x)", "in terms of", "express"),
)
ASKS_MATH = re.compile(
    r"\b(?:solve|calculate|compute|simplify|factori[sz]e|factor|differentiate|integrate|prove that|remainder|derivative"
    r"|integral|polynomial|quadratic|hypotenuse|perimeter|probability (?:that|of)|area of|volume of|value of [a-z]"
    r"|in terms of [a-z]|express [a-z] ?[-+*/] ?[a-z])\b|\bf\(x\)"
)
HOW_MANY = re.compile(
    r"\b(?:how (?:many|much|long|old|far|fast|tall|often)|in total"
    r"|what(?:['’]s| (?:is|was|are|will|percent\w*|fraction))"
    r"(?=[^?\n]{0,80}\b(?:total|average|percent\w*|fraction|number|amount|cost|price|profit|sum|difference|ratio|age|per"
    r"|speed|distance|weight|height|length|dollars|hours|minutes|change|score|be)))\b"
)
NUMBER = re.compile(
    r"\d+|\b(?:one|two|three|four|five|six|seven|eight|nine|ten|twelve|half|twice|dozen|third|quarter|double|triple|times)\b"
)
OPEN = re.compile(rf"{OPENING}|<\|(?:begin_of|start)_{NAME}\|>|<\|channel\|>analysis<\|message\|>", re.I)
TAG = rf"{CLOSING}|<\|end_(?:of_)?{NAME}\|>"
CLOSE = re.compile(rf"{TAG}|<\|end\|>", re.I)
ALONE = re.compile(rf"^[ \t]*+(?:{TAG})[ \t]*$", re.I | re.M)  # a closing tag alone on its line
OPENED = re.compile(rf"(?:{OPEN.pattern})\s*$", re.I)  # the end of a prompt that opens a reasoning block


def declared(record: Any) -> str | None:
    """Return the kind that a record declares in `kind` or `category`, or None if there is none or it is unknown.

    A `category` named `reasoning` is a topic and declares no kind.
    """
    if not isinstance(record, dict):
        return None
    kind, category = (CATEGORIES.get(str(record.get(key)).lower()) for key in ("kind", "category"))
    return kind or (category if category != REASONING else None)  # MT-Bench's category `reasoning`: riddles


def length_group(tokens: int) -> str:
    """Return the group of a length, such as `33 to 128`; `0` for an empty text."""
    if tokens == 0:
        return "0"
    low, high = 0, 0
    for high in LENGTHS:
        if tokens <= high:
            return f"{low + 1:,} to {high:,}"
        low = high
    return f"over {low:,}"


def check_kind(kind: Any, setting: str) -> None:
    """Check the kind that a setting declares.

    Raises:
        UserError: it is unknown.
    """
    if kind not in KINDS:
        raise UserError(f"{setting}={kind!r}: expected one of {', '.join(KINDS)}.")


def answer_kind(conversation: Conversation, turn: int, *, reasoning: bool = False) -> str:
    """Return the kind of an answer, one of `KINDS`.

    Args:
        conversation: the conversation, with or without later turns.
        turn: message index of the answer.
        reasoning: whether the prompt already opened a reasoning block.
    """
    messages = conversation.messages[: turn + 1]
    if conversation.tools or any(message["role"] == "tool" or message.get("tool_calls") for message in messages):
        return TOOLS
    answer = messages[-1]
    thought, text = _split(str(answer.get("content") or ""), opened=reasoning)
    if thought.strip() or str(answer.get("reasoning_content") or "").strip():
        return REASONING
    question = next((message["content"] for message in reversed(messages) if message["role"] == "user"), "")
    return text_kind(question or "", text)


def _split(text: str, *, opened: bool) -> tuple[str, str]:
    """Split an answer into its reasoning and the rest. A tag that the text only mentions starts no reasoning.

    Args:
        text: the answer.
        opened: whether the prompt already opened a reasoning block.
    """
    start = re.match(rf"\s*(?:{OPEN.pattern})", text, re.I)
    if start or opened:
        begin = start.end() if start else 0
        end = CLOSE.search(text, begin)
        return (text[begin : end.start()], text[end.end() :]) if end else (text[begin:], "")
    end = ALONE.search(text) if any(mark in text for mark in ("</", "[/", "◁/", "<|")) else None
    if end and "```" not in text[: end.start()] and not OPEN.search(text[: end.start()]):
        return text[: end.start()], text[end.end() :]
    return "", text


def text_kind(question: str, answer: str) -> str:
    """Return the kind of an answer by its text and its question alone: code, math or chat."""
    question, answer = question[-READ:], answer[:READ]
    asked = question.lower()
    if _has_code(answer) or _has_code(question) or _asks(asked, ASKS_CODE, (*PROGRAMS, *LANGUAGES)):
        return CODE
    if _has_math(answer):
        return MATH
    is_task = len(question) <= TASK and (_has_math(question) or _asks_math(asked))
    return MATH if is_task else CHAT


def _has_code(text: str) -> bool:
    labels = {label.lower() for label in FENCE.findall(text)} if "```" in text or "~~~" in text else set()
    if labels - NOT_CODE:
        return True
    if "\n" not in text:
        return False
    text = PROSE_TAG.sub("", text) if "<" in text else text
    lines = len(CODE_LINE.findall(text))
    return bool(lines and "" in labels) or (lines >= 2 and lines >= 0.5 * len(LINE.findall(text)))


def _has_math(text: str) -> bool:
    """Return whether a text contains LaTeX, a result or an equation."""
    return bool(
        (("\\" in text or "$" in text) and LATEX.search(text))
        or ("####" in text and RESULT.search(text))
        or (("=" in text or "<" in text or ">" in text) and EQUATION.search(text))
    )


def _asks_math(question: str) -> bool:
    """Return whether a question in lower case asks for a quantity and gives numbers."""
    numbers = len(NUMBER.findall(question))
    return (numbers >= 1 and _asks(question, ASKS_MATH, TASKS)) or (numbers >= 2 and bool(HOW_MANY.search(question)))


def _asks(question: str, pattern: re.Pattern[str], words: tuple[str, ...]) -> bool:
    """Return whether a lower-case question matches a pattern. Each match contains one of the words, found faster."""
    return any(word in question for word in words) and pattern.search(question) is not None
