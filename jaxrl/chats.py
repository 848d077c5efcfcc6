"""Chats from a file as sequences to train on: the assistant's words, and nothing else, have loss.

    {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
    {"prompt": "2+2?", "completion": "4"}

Messages are rendered with the checkpoint's own template; every turn of the assistant is learnt. Where the
template marks the assistant's words ({% generation %}), they are those; else a turn is what the template
adds to the prompt before it. A template may write an earlier turn in another way than the last one (Qwen3
leaves its thoughts out): then each turn is a sequence of its own, after the prompt as it is at inference.
A prompt with a completion is a user's turn with its answer if model.chat is set, else plain text. Both may
also be lists of messages; then only turns of the completion are learnt. `tools` go to the template.

Tokens are those of the whole text; where a prompt alone has other tokens than as the start of the whole,
the prompt is encoded by itself, as at inference. What a template writes after the stop token that ends a
turn has no loss; a stop token that follows the turn has.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl.chat import ChatTemplate
from jaxrl.errors import UserError
from jaxrl.packing import TrainSequence
from jaxrl.tasks.rows import Row, read_rows
from jaxrl.tokenizer import Tokenizer

_ROLES = ("system", "developer", "user", "assistant", "tool")
_FORM = (
    'write {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]} '
    'or {"prompt": "...", "completion": "..."}'
)
_HASH_PARTS = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Chat:
    """One row, tokenised: T tokens, of which `learnt` have loss."""

    where: str
    """File and line."""
    tokens: np.ndarray  # [T] int32
    learnt: np.ndarray  # [T] bool, never the first
    prompt_tokens: int
    """Tokens before the last turn that is learnt: what its reply is sampled from."""
    prompt: str
    """The same as text."""
    reply: str
    """That turn, for comparison."""
    position: float
    """In [0, 1), by the hash of the row: which chats are held out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Renderer:
    """How rows become text and tokens."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    """None for a base model, which can learn prompts and completions as plain text."""
    chat: bool = False
    """Prompts and completions are turns of a chat."""
    system: str | None = None
    """First turn of chats that bring none."""
    thinking: bool | None = None
    """Mode of a hybrid model; None: its template's default."""


def read_chats(
    source: Path, renderer: Renderer, *, longest: int, skip_long: bool
) -> tuple[list[Chat], int]:
    """(chats, rows left out as too long) of a file or a data set of the hub.

    longest: most tokens of a chat. A row may give several chats, one per turn of the assistant.
    Raises: UserError naming file and line of the first row that cannot be used, or that is too long
    unless skip_long.
    """
    chats: list[Chat] = []
    skipped = 0
    for where, row in read_rows(source):
        try:
            made = _chats_of(row, where, renderer)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        most = max(len(chat.tokens) for chat in made)
        if most <= longest:
            chats += made
        elif skip_long:
            skipped += 1
        else:
            raise UserError(
                f"{where}: the chat has {most} tokens, more than train.row_tokens={longest}; set that to at "
                "least as many, shorten the chat, or leave such chats out with sft.skip_long=true"
            )
    if not chats:
        raise UserError(f"{source} holds no chat of at most {longest} tokens; {_FORM}")
    return chats, skipped


def to_sequences(chats: Sequence[Chat]) -> list[TrainSequence]:
    """The chats of one optimizer step; token_weights are 1 / (learnt tokens of all), a token mean."""
    total = sum(int(chat.learnt.sum()) for chat in chats)
    sequences = []
    for chat in chats:
        zeros = np.zeros(len(chat.tokens), np.float32)
        sequences.append(
            TrainSequence(
                tokens=chat.tokens, loss_mask=chat.learnt, sampler_logprobs=zeros, advantages=zeros,
                token_weights=chat.learnt.astype(np.float32) / np.float32(total),
            )
        )  # fmt: skip
    return sequences


def _chats_of(row: Row, where: str, renderer: Renderer) -> list[Chat]:
    digest = hashlib.blake2b(json.dumps(row, sort_keys=True, default=str).encode(), digest_size=8)
    position = int.from_bytes(digest.digest()) % _HASH_PARTS / _HASH_PARTS
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str) and not renderer.chat:
        texts = [_plain(prompt, completion, renderer.tokenizer)]
    else:
        messages, first = _messages(row)
        if renderer.system is not None and messages[0]["role"] not in ("system", "developer"):
            messages = [{"role": "system", "content": renderer.system}, *messages]
            first += 1
        texts = _rendered(messages, first, row.get("tools") or (), renderer)
    return [_chat(text, where, position, renderer.tokenizer) for text in texts]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Text:
    """A text and (begin, end) of what is learnt of it, ascending."""

    text: str
    spans: list[tuple[int, int]]
    plain: bool = False
    """No template has put start and stop tokens into it."""


def _plain(prompt: str, completion: str, tokenizer: Tokenizer) -> _Text:
    if not completion:
        raise UserError("'completion' is empty; leave the row out")
    if not prompt and tokenizer.bos_id is None:
        raise UserError(
            f"'prompt' is empty, and {tokenizer.name} has no start token to stand for it; give a prompt"
        )
    text = prompt + completion
    return _Text(text=text, spans=[(len(prompt), len(text))], plain=True)


def _messages(row: Row) -> tuple[list[dict[str, Any]], int]:
    """(turns, number of those that are only given); checked. Raises: UserError."""
    if "messages" in row:
        messages, given = row["messages"], 0
    elif "prompt" in row and "completion" in row:
        turns = [
            [{"role": role, "content": row[key]}] if isinstance(row[key], str) else row[key]
            for key, role in (("prompt", "user"), ("completion", "assistant"))
        ]
        if not all(isinstance(part, list) for part in turns):
            raise UserError(f"'prompt' and 'completion' must be both texts or lists; {_FORM}")
        messages, given = turns[0] + turns[1], len(turns[0])
    else:
        raise UserError(f"the row has the fields {', '.join(map(str, row)) or 'none'}; {_FORM}")
    if not isinstance(messages, list) or not messages:
        raise UserError(f"'messages' is {messages!r:.60}, not a list of turns; {_FORM}")
    for number, turn in enumerate(messages, start=1):
        _check_turn(turn, number)
    if all(turn["role"] != "assistant" for turn in messages[given:]):
        raise UserError("no turn of the assistant to learn; add one, or leave the row out")
    return messages, given


def _check_turn(turn: object, number: int) -> None:
    if not isinstance(turn, dict):
        raise UserError(f"turn {number} is {turn!r:.60}, not an object with role and content")
    if turn.get("role") not in _ROLES:
        raise UserError(
            f"turn {number} has the role {turn.get('role')!r}; it must be one of {', '.join(_ROLES)}"
        )
    calls = turn["role"] == "assistant" and turn.get("tool_calls")
    if not isinstance(turn.get("content"), str) and not calls:
        raise UserError(f"turn {number} ({turn['role']}) has no text as its content")
    if turn["role"] == "assistant" and not turn.get("content") and not calls:
        raise UserError(f"turn {number}, the assistant's, is empty; leave it out")


def _rendered(
    messages: list[dict[str, Any]], given: int, tools: Sequence[Mapping[str, Any]],
    renderer: Renderer,
) -> list[_Text]:  # fmt: skip
    """The chat with the spans to learn, or one text per turn of the assistant. Raises: UserError."""
    template, thinking = renderer.template, renderer.thinking
    if template is None:
        raise UserError(
            "messages need a checkpoint with a chat template, which model.path has not; use a chat "
            'checkpoint, or rows of the form {"prompt": "...", "completion": "..."}'
        )
    whole, spans = template.marked(messages, thinking=thinking, tools=tools)
    if spans:
        start = 0
        if given:
            start = len(
                template.render(messages[:given], reply=False, thinking=thinking, tools=tools)
            )
        learnt = [span for span in spans if span[0] >= start and span[0] < span[1]]
        return [_Text(text=whole, spans=learnt)]
    turns: list[_Text] = []
    for i, turn in enumerate(messages):
        if i < given or turn["role"] != "assistant":
            continue
        before = template.render(messages[:i], thinking=thinking, tools=tools)
        after = template.render(messages[: i + 1], reply=False, thinking=thinking, tools=tools)
        if not after.startswith(before):
            raise UserError(
                f"the chat template writes turn {i + 1} with its answer in another way than the prompt "
                "before it; leave model.thinking at its default, or write the answer as the template "
                "expects it"
            )
        turns.append(_Text(text=after, spans=[(len(before), len(after))]))
    if all(whole.startswith(turn.text) for turn in turns):
        return [_Text(text=whole, spans=[span for turn in turns for span in turn.spans])]
    return turns


def _chat(part: _Text, where: str, position: float, tokenizer: Tokenizer) -> Chat:
    if not part.spans:
        raise UserError("the chat template marks no word of the assistant's; add a turn of its own")
    tokens, cuts = _encode(part.text, [edge for span in part.spans for edge in span], tokenizer)
    if part.plain:
        start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        tokens = [*start, *tokens, tokenizer.stop_ids[0]]
        cuts = [cut + len(start) for cut in cuts]
    learnt = np.zeros(len(tokens), bool)
    for begin, end in zip(cuts[::2], cuts[1::2], strict=True):
        learnt[begin : _end(tokens, begin, end, tokenizer.stop_ids)] = True
    if learnt[0]:
        raise UserError("the chat begins with the assistant's words, which nothing predicts")
    begin, end = part.spans[-1]
    return Chat(
        where=where, tokens=np.array(tokens, np.int32), learnt=learnt, prompt_tokens=cuts[-2],
        prompt=part.text[:begin], reply=part.text[begin:end], position=position,
    )  # fmt: skip


def _end(tokens: Sequence[int], begin: int, end: int, stop_ids: Sequence[int]) -> int:
    """Where a turn's loss ends: behind its last stop token, or behind the one that follows it."""
    inside = [i for i in range(begin, end) if tokens[i] in stop_ids]
    if inside:
        return inside[-1] + 1
    return end + 1 if end < len(tokens) and tokens[end] in stop_ids else end


def _encode(text: str, edges: Sequence[int], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Tokens of the text, and how many of them stand before each of the ascending edges."""
    tokens = tokenizer.encode(text)
    heads = [tokens if edge == len(text) else tokenizer.encode(text[:edge]) for edge in edges]
    if all(tokens[: len(head)] == head for head in heads):
        return tokens, [len(head) for head in heads]
    tokens, cuts = [], []
    for begin, end in itertools.pairwise([0, *edges, len(text)]):
        tokens += tokenizer.encode(text[begin:end])
        cuts.append(len(tokens))
    return tokens, cuts[:-1]
