"""Chats as the text a model was trained on: its own jinja template, rendered in a sandbox.

A template is code from a checkpoint. It sees plain data only, runs in jinja's immutable sandbox, and
cannot reach files or Python's internals. It is rendered as transformers renders it (same settings, same
functions), but for the date: a prompt must be the same tomorrow, or a resumed run is another run.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxrl.errors import UserError
from jaxrl.tokenizer import Tokenizer
from jaxrl.tokenizer.hugging_face import read_settings, special_token

TODAY = datetime.date(2025, 7, 1)
"""The day that templates are told it is, unless the caller says another."""
_THINKING = "enable_thinking"
_MARK = re.compile("\N{NULL}generation\N{NULL}")
"""Beside the assistant's words while a chat is marked; no text of JSON rows that a template prints has it."""
_TEMPLATE_ERRORS = (
    jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError,
)  # fmt: skip

Messages = Sequence[Mapping[str, Any]]
"""Turns of a chat, each with `role` (system, user, assistant, tool) and `content`."""


class ChatTemplate:
    """A compiled template with the special tokens it refers to."""

    def __init__(
        self, source: str, *, bos_token: str = "", eos_token: str = "", today: datetime.date = TODAY
    ) -> None:
        """Raises: UserError for a template that is no jinja."""
        environment = _environment(_GenerationBlocks, today)
        try:
            self._template = environment.from_string(source)
            known = meta.find_undeclared_variables(environment.parse(source))
            self._marked = _environment(_MarkedBlocks, today).from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template is no valid jinja: {error}") from error
        self.bos_token = bos_token
        self._eos_token = eos_token
        self.can_think = _THINKING in known
        """The template has modes with and without thinking."""

    def render(
        self,
        messages: Messages,
        *,
        reply: bool = True,
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """The chat as text; with `reply`, up to where the assistant's next turn begins.

        thinking: False for a hybrid model's mode without it, None for the template's default.
        The text holds every special token, the start token included: encode it without another.
        Raises: UserError for a chat the template refuses, or a mode that it does not have.
        """
        if thinking is not None and not self.can_think:
            raise UserError(
                f"thinking={thinking}, but this model's chat template has no such modes; leave it out"
            )
        return self._render(self._template, messages, reply, thinking, tools)

    def marked(
        self,
        messages: Messages,
        *,
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> tuple[str, list[tuple[int, int]]]:
        """The whole chat as text, and (begin, end) of each part that the template itself marks as the
        assistant's with `{% generation %}`; none if it marks nothing.

        Raises: UserError as `render`.
        """
        pieces = _MARK.split(self._render(self._marked, messages, False, thinking, tools))
        spans, text = [], pieces[0]
        for inside, outside in zip(pieces[1::2], pieces[2::2], strict=True):
            spans.append((len(text), len(text) + len(inside)))
            text += inside + outside
        return text, spans

    def _render(
        self, template: jinja2.Template, messages: Messages, reply: bool, thinking: bool | None,
        tools: Sequence[Mapping[str, Any]],
    ) -> str:  # fmt: skip
        variables: dict[str, Any] = {} if thinking is None else {_THINKING: thinking}
        try:
            return template.render(
                messages=_plain(messages),
                tools=_plain(tools) or None,
                add_generation_prompt=reply,
                bos_token=self.bos_token,
                eos_token=self._eos_token,
                **variables,
            )
        except _TEMPLATE_ERRORS as error:
            raise UserError(
                f"the chat template refuses this chat ({error}); roles: "
                f"{[message.get('role') for message in messages]}"
            ) from error

    def prompt(
        self, question: str, *, system: str | None = None, thinking: bool | None = None
    ) -> str:
        """One question as a chat, ready for the answer."""
        start = [] if system is None else [{"role": "system", "content": system}]
        return self.render([*start, {"role": "user", "content": question}], thinking=thinking)

    def split(self, messages: Messages, *, thinking: bool | None = None) -> tuple[str, str]:
        """(prompt, completion) of a chat that ends with the assistant's turn: what is given and what
        is learnt, closing token included.

        Raises: UserError if the last turn is another's, or if the template writes what came before
        it in another way than in the prompt.
        """
        if not messages or messages[-1].get("role") != "assistant":
            raise UserError("the last message of a training chat must be the assistant's")
        prompt = self.render(messages[:-1], thinking=thinking)
        whole = self.render(messages, reply=False, thinking=thinking)
        if not whole.startswith(prompt):
            raise UserError(
                "this chat template writes a chat with its answer differently from the prompt before "
                "it; train with thinking left out, or with the answer in the form the template expects"
            )
        return prompt, whole[len(prompt) :]


class ChatTokenizer:
    """A checkpoint's tokenizer for prompts that are the user's turn of a chat.

    bos_id is None: where a model wants a start token, its template writes it.
    """

    bos_id = None

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        *,
        system: str | None = None,
        thinking: bool | None = None,
    ) -> None:
        """Raises: UserError for a mode of thinking that the template does not have."""
        self._tokenizer = tokenizer
        self._prompt = partial(template.prompt, system=system, thinking=thinking)
        self._split = partial(template.split, thinking=thinking)
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._prompt("")
        self.name = f"{tokenizer.name}, as a chat"
        self.vocab_size = tokenizer.vocab_size
        self.stop_ids = tokenizer.stop_ids
        self.pad_id = tokenizer.pad_id

    def encode_question(self, text: str) -> list[int]:
        """Ids of a chat with this question, up to where the answer begins."""
        return self._tokenizer.encode(self._prompt(text))

    def encode_chat(self, messages: Messages) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(prompt, last turn) of a chat that ends with the assistant's, up to its first stop token.

        The configured system turn is put first where the chat has none.
        Raises: UserError as `ChatTemplate.split`.
        """
        given = messages and messages[0].get("role") == "system"
        prompt, completion = self._split([*([] if given else self._system), *messages])
        ids = self._tokenizer.encode(completion)
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), len(ids))
        stop = ids[end] if end < len(ids) else self.stop_ids[0]
        return tuple(self._tokenizer.encode(prompt)), (*ids[:end], stop)

    def encode(self, text: str) -> list[int]:
        """Ids of a text as it stands, such as an answer."""
        return self._tokenizer.encode(text)

    def decode(self, ids: Iterable[int], *, continues: bool = False) -> str:
        """Text of the ids; see Tokenizer.decode."""
        return self._tokenizer.decode(ids, continues=continues)


def load_chat_template(folder: Path, *, today: datetime.date = TODAY) -> ChatTemplate:
    """The template of the checkpoint in `folder`: chat_template.jinja, else tokenizer_config.json's
    (its `default`, if there are several).

    Raises: UserError if it has none, as base models do.
    """
    template = find_chat_template(folder, today=today)
    if template is None:
        raise UserError(
            f"{folder} has no chat template (it may be a base model); use a chat checkpoint, or prompts "
            "as plain text"
        )
    return template


def find_chat_template(folder: Path, *, today: datetime.date = TODAY) -> ChatTemplate | None:
    """`load_chat_template`, or None if the checkpoint has none."""
    settings = read_settings(folder / "tokenizer_config.json")
    source = settings.get("chat_template")
    if isinstance(source, list):
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    path = folder / "chat_template.jinja"
    if path.exists():
        source = path.read_text(encoding="utf-8")
    if not isinstance(source, str):
        return None
    return ChatTemplate(
        source,
        bos_token=special_token(settings, "bos_token"),
        eos_token=special_token(settings, "eos_token"),
        today=today,
    )


class _GenerationBlocks(Extension):
    """`{% generation %}`, which marks the assistant's words for training, renders as its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes between the two tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _MarkedBlocks(_GenerationBlocks):
    """`{% generation %}` as its content between two marks."""

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes between the two tags, and a mark on either side."""
        mark = nodes.Output([nodes.TemplateData(_MARK.pattern)])
        return [mark, *super().parse(parser), mark]


def _environment(blocks: type[Extension], today: datetime.date) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[blocks, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = today.strftime
    return environment


def _plain(data: Any) -> Any:
    """The same as dictionaries, lists and numbers: no object with methods reaches a template."""
    return json.loads(json.dumps(data))


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """jinja's own filter would escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
