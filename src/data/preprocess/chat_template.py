"""Renders and tokenizes prompts and training conversations with the target's chat template and tokenizer."""

import bisect
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property, partial
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from data.errors import BadRecord, UserError
from data.preprocess.boundaries import AnswerDocument, BoundaryTokenizer
from data.preprocess.content_forms import QUESTION, SAMPLE_TEXT, content_form
from data.preprocess.prompts import CHECKED, Render
from data.preprocess.spans import CUT_OFF, NO_END_TOKEN, Supervision
from data.preprocess.supervision import Supervisor
from data.preprocess.templates import check_reserved, check_template_kwargs, names_role, template_switches, writes_date
from data.preprocess.tool_calls import CallForm, call_form
from data.preprocess.written import TokenIdChecker
from data.sources.records import Conversation, Messages, Written
from data.sources.turns import REASONING


@dataclass
class Rendered:
    """A rendered conversation."""

    supervision: Supervision
    answers: int  # number of answers in the conversation
    left_out: int = 0  # number of trailing answers left out because of the token limit
    tokens: int = 0  # length of the whole conversation; computed only if answers are left out
    written: Mapping[int, Written] = field(default_factory=dict)  # answers as the target wrote them, by message index
    untrained: int = 0  # number of answers that the record excludes from training
    skipped: int = 0  # number of answers before the first question, in addition to `answers`
    offset: int = 0  # see `Conversation`


class ChatEncoder:
    """Renders and tokenizes conversations with a target's chat template and tokenizer."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template_kwargs: dict[str, Any],
        stop_ids: Collection[int] | None = None,
    ) -> None:
        """Set up the template variables, the special tokens and the `tokenizers` backend.

        Args:
            tokenizer: the target's tokenizer.
            template_kwargs: arguments for the chat template.
            stop_ids: tokens at which the target's generation stops. Default: the tokenizer's end-of-sequence token.

        Raises:
            UserError: the tokenizer has no chat template, or is a slow tokenizer (no `tokenizers` backend), or an
                argument is reserved.
        """
        check_reserved(template_kwargs)
        if not tokenizer.is_fast:
            raise UserError(
                f"The tokenizer of {tokenizer.name_or_path!r} is slow (pure Python). Set model.target.tokenizer to a "
                "fast one, backed by the `tokenizers` library."
            )
        self.template = _chat_template(tokenizer, None)
        self.tool_template = _chat_template(tokenizer, [])  # differs if the tokenizer has a template named `tool_use`
        self.variables = {**tokenizer.special_tokens_map, **template_kwargs}
        if stop_ids is None:
            stop_ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.stop_tokens = sorted({str(tokenizer.decode([token])) for token in stop_ids} - {""})
        added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
        special = {token for token in added if added[token]} | set(tokenizer.all_special_tokens) | set(self.stop_tokens)
        self.special_tokens = sorted(special)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        # Drop the post-processor: it adds no tokens here, but excludes whitespace from the offsets.
        self.backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.backend.post_processor = None
        self.backend.no_truncation()
        self.backend.no_padding()
        self.boundaries = BoundaryTokenizer(self.backend)
        self.content_form = content_form(self._render_as_given)
        self.supervisor = Supervisor(self._render, self.stop_tokens, added, template_switches(self.template))
        self.token_ids = TokenIdChecker(self.backend, stop_ids)

    def check_kwargs(self, given: dict[str, Any], overrides: list[str], warn: Callable[[str], None]) -> None:
        """Check that the chat template reads every argument in `given`.

        Raises:
            UserError: see `check_template_kwargs`.
        """
        check_template_kwargs(self.template, given, overrides, warn, also=self.variables.keys() - given.keys())

    def prompt(self, conversation: Conversation) -> list[int]:
        """Return the prompt tokens: the conversation followed by the generation prompt.

        Raises:
            BadRecord: see `render`.
        """
        messages, render = self._prepared(conversation)
        return self._ids(render(messages, True))

    def render(self, conversation: Conversation, max_tokens: int | None = None) -> Rendered:
        """Render a conversation with the target's chat template and locate its answers.

        Args:
            conversation: the conversation.
            max_tokens: in a conversation with more than CHECKED answers, leave out trailing answers whose prompts have
                more tokens than this. Prompt lengths are assumed to grow from turn to turn. None keeps all answers.

        Raises:
            BadRecord: the template rejects the conversation, a message contains one of the target's special tokens, or
                the token ids of an answer do not belong to its text.
        """
        written = conversation.written
        for turn, answer in written.items():
            self._check_token_ids(conversation, turn, answer)
        last = written.get(len(conversation.messages) - 1)
        # The text of a last answer with known tokens is not rendered as history.
        messages, render = self._prepared(conversation, with_last=last is None or last.token_ids is None)
        answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        within = turns = [turn for turn in answers if turn not in conversation.untrained]

        def length(turn: int) -> int:
            return len(self._ids(render(messages[:turn], True)))

        if max_tokens is not None and len(turns) > CHECKED and length(turns[-1]) > max_tokens:
            within = turns[: bisect.bisect_right(turns, max_tokens, key=length)]
        supervisor = self.supervisor.rendering(render) if conversation.tools else self.supervisor
        supervision = supervisor.supervise(messages, within, written)
        if written:
            supervision.notes = supervision.notes + self._notes(within, written)
        rendered = Rendered(
            supervision,
            len(answers),
            left_out=len(turns) - len(within),
            written=written,
            untrained=len(answers) - len(turns),
            skipped=conversation.skipped,
            offset=conversation.offset,
        )
        if rendered.left_out:
            rendered.tokens = len(self._ids(render(messages, False)))
        return rendered

    def tokenize(self, rendered: list[Rendered]) -> list[list[AnswerDocument]]:
        """Tokenize rendered conversations and return the documents of each. Passing many at once is faster."""
        found = [(conversation.supervision.texts, conversation.written) for conversation in rendered]
        first = iter(self.boundaries.encode([texts[0].text for texts, _ in found if texts]))
        return [list(self.boundaries.documents(t, next(first), written)) if t else [] for t, written in found]

    def documents(self, conversation: Conversation) -> list[AnswerDocument]:
        """Render and tokenize a single conversation, and return its documents.

        Raises:
            BadRecord: see `render`.
        """
        return self.tokenize([self.render(conversation)])[0]

    def fingerprint(self) -> dict[str, Any]:
        """Return everything that affects the tokens of a conversation, including the date if the template writes it."""
        dated = (
            {"date": date.today().isoformat()} if writes_date(self.template + self.tool_template, self._render) else {}
        )
        tokens = hashlib.sha256(self.backend.to_str().encode()).hexdigest()
        variables = {"variables": self.variables, "special": self.special_tokens, "stop": self.stop_tokens}
        templates = {"template": self.template, "tool_template": self.tool_template}
        return {"tokenizer": tokens, **templates, **variables, **dated}

    def _prepared(self, conversation: Conversation, *, with_last: bool = True) -> tuple[Messages, Render]:
        """Return the messages in the form that the template expects, and the function that renders them.

        Raises:
            BadRecord: the tools or a message, except the last one if `with_last` is false, contain a special token, or
                the template does not write the tools.
        """
        messages, tools = conversation.messages, conversation.tools
        self._refuse_special_tokens(messages if with_last else messages[:-1])
        if messages[0]["role"] == "developer" and not self.writes_developer:
            messages = [messages[0] | {"role": "system"}, *messages[1:]]
        if messages[0]["role"] == "system" and self.drops_system:
            raise BadRecord("the chat template does not write the system prompt, so the target would not see it")
        if any("reasoning_content" in message for message in messages):
            messages = [_with_reasoning_names(message) for message in messages]
        if any("tool_calls" in message for message in messages):
            messages = self.call_form.apply(messages)
        if not tools:
            return messages, self._render
        if special := self._special_token(json.dumps(tools, ensure_ascii=False)):
            raise BadRecord(f"the tools contain the target's special token {special}")
        return self._with_tools(messages, tools)

    def _with_tools(self, messages: Messages, tools: list[dict[str, Any]]) -> tuple[Messages, Render]:
        """Pass the tools to the template as `tools`, or where it reads them instead, as documented for its model.

        SmolLM3's template reads `xml_tools`, and that of Phi-4 mini a text in the system message.

        Raises:
            BadRecord: the template does not write the tools into the prompt.
        """
        first = next(turn for turn, message in enumerate(messages) if message["role"] == "user") + 1
        without = self._render(messages[:first], True, tools=None)
        if self._render(messages[:first], True, tools=tools) != without:
            return messages, partial(self._render, tools=tools)
        if "xml_tools" in self.template and self._render(messages[:first], True, xml_tools=tools) != without:
            return messages, partial(self._render, xml_tools=tools)
        text = json.dumps([tool["function"] for tool in tools], ensure_ascii=False)
        placed = [messages[0] | {"tools": text}, *messages[1:]]
        if messages[0]["role"] == "system" and self._render(placed[:first], True) != without:
            return placed, self._render
        raise BadRecord("the chat template does not write `tools` into the prompt, so the target would not see them")

    @cached_property
    def call_form(self) -> CallForm:
        """Form of tool calls that the template expects."""
        return call_form(self._render)

    @cached_property
    def drops_system(self) -> bool:
        """Whether the template drops system prompts without an error."""
        return self._drops([{"role": "system", "content": SAMPLE_TEXT}, QUESTION])

    @cached_property
    def writes_developer(self) -> bool:
        """Whether the template has a form for developer prompts and writes them."""
        sample = [{"role": "developer", "content": SAMPLE_TEXT}, QUESTION]
        with suppress(BadRecord):
            return names_role(self.template, "developer") and SAMPLE_TEXT in self._render(sample, True)
        return False

    def _drops(self, sample: Messages) -> bool:
        try:
            return SAMPLE_TEXT not in self._render(sample, True)
        except BadRecord:
            return False

    def _refuse_special_tokens(self, messages: Messages) -> None:
        for number, message in enumerate(messages, start=1):
            text = message["content"] if len(message) == 2 else "\0".join(map(_text, message.values()))
            if special := self._special_token(text):  # would be tokenized as a control token, such as end of turn
                raise BadRecord(f"turn {number}: the text contains the target's special token {special}")

    def _special_token(self, text: str) -> str | None:
        return next((token for token in self.special_tokens if token in text), None)

    def _check_token_ids(self, conversation: Conversation, turn: int, answer: Written) -> None:
        try:
            if answer.token_ids is not None:
                self.token_ids.check(conversation.messages[turn], answer.token_ids)
        except BadRecord as error:
            raise BadRecord(f"turn {turn + conversation.offset + 1}: {error}") from None

    def _notes(self, turns: list[int], written: Mapping[int, Written]) -> Counter[str]:
        """Return the notes on the answers whose tokens or end are known."""
        known = [written[turn] for turn in turns if turn in written]
        ends = self.token_ids.stop_ids
        complete = [answer.token_ids for answer in known if answer.token_ids and not answer.truncated]
        without_end = sum(token_ids[-1] not in ends for token_ids in complete)
        return Counter({CUT_OFF: sum(answer.truncated for answer in known), NO_END_TOKEN: without_end})

    def _ids(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def _render(self, messages: Messages, generation_prompt: bool, **tools: Any) -> str:
        return self._render_as_given(self.content_form.apply(messages), generation_prompt, **tools)

    def _render_as_given(self, messages: Messages, generation_prompt: bool, **tools: Any) -> str:
        apply: Callable[..., Any] = render_jinja_template  # annotated to return str, but returns texts and spans
        given = self.variables | tools if tools else self.variables
        template = self.tool_template if given.get("tools") else self.template
        options = {"chat_template": template, "add_generation_prompt": generation_prompt}
        try:
            return apply([messages], **options, **given)[0][0]
        except Exception as error:  # a template is a program: besides TemplateError, it may raise anything
            raise BadRecord(f"rejected by the target's chat template: {error}") from error


def _with_reasoning_names(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with its reasoning under each of the names that templates read."""
    reasoning = message.get("reasoning_content")
    return message if reasoning is None else dict.fromkeys(REASONING, reasoning) | message


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def load_encoder(target: dict[str, Any], template_kwargs: dict[str, Any]) -> tuple[ChatEncoder, Any]:
    """Return the encoder and the tokenizer for a target, given its settings (`model.target`).

    Raises:
        UserError: the settings name no tokenizer, or the tokenizer fails to load, is slow or has no chat template.
    """
    name = target["tokenizer"] or target["name"]
    if name is None:
        raise UserError("model.target.tokenizer=null: random weights have no tokenizer. Set it to a path or Hub ID.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=target["revision"] if name == target["name"] else None)
    except (OSError, ValueError) as error:
        raise UserError(f"model.target.tokenizer={name!r}: failed to load the tokenizer. {error}") from error
    return ChatEncoder(tokenizer, template_kwargs, _stop_ids(target["name"] or name, target["revision"])), tokenizer


def _chat_template(tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None) -> str:
    try:
        return tokenizer.get_chat_template(tools=tools)
    except ValueError as error:  # no template, or several templates without a default
        name, names = tokenizer.name_or_path, sorted(tokenizer.chat_template or ())
        if not names:
            raise UserError(
                f"The tokenizer of {name!r} has no chat template. Use the instruction-tuned target, or add a chat "
                "template to the tokenizer."
            ) from error
        raise UserError(
            f"The tokenizer of {name!r} has the chat templates {', '.join(names)}, but none named default. Choose one: "
            f"tokenizer.chat_template = tokenizer.chat_template[{names[0]!r}]; tokenizer.save_pretrained(DIR). Then "
            "set model.target.tokenizer=DIR."
        ) from error


def _stop_ids(name: str, revision: str | None) -> list[int] | None:
    """Return the stop tokens that `target.generate` uses, or None if neither config defines any.

    As in transformers, `generation_config.json` takes precedence over `config.json`.
    """
    try:
        stop = GenerationConfig.from_pretrained(name, revision=revision or "main").eos_token_id
    except (OSError, ValueError):
        stop = None
    try:
        stop = AutoConfig.from_pretrained(name, revision=revision).eos_token_id if stop is None else stop
    except (OSError, ValueError, AttributeError):
        stop = None
    return [stop] if isinstance(stop, int) else stop
