"""Preference pairs from a file: a prompt with a better and a worse completion.

    {"prompt": "2+2=", "chosen": "4", "rejected": "5"}                         plain text
    {"prompt": [turns], "chosen": [turn], "rejected": [turn]}                  chat, the answers apart
    {"chosen": [turns and answer], "rejected": [the same turns and answer]}    chat, written out twice

A turn is {"role", "content"}. Chats need a checkpoint with a template (model.chat); there a prompt of
plain text is the user's turn. Other fields are left alone. A completion ends with a stop token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrl.chat import ChatTokenizer
from jaxrl.errors import UserError
from jaxrl.tasks.rows import Row, check_source, read_rows
from jaxrl.tokenizer import Tokenizer

_FORM = 'write {"prompt": "...", "chosen": "...", "rejected": "..."}, or lists of {"role", "content"} turns'
Ids = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One prompt, tokenised, with both completions, their stop token included."""

    prompt: Ids
    chosen: Ids
    rejected: Ids
    """Empty where only the chosen one is read (loss sft)."""


def read_pairs(
    source: Path, tokenizer: Tokenizer, *, longest: int, with_rejected: bool, add_bos: bool
) -> list[Pair]:
    """All pairs of a file or data set, in its order.

    Args:
        source: as task.path.
        tokenizer: a ChatTokenizer for chats.
        longest: most tokens of a prompt with a completion.
        with_rejected: rejected completions are wanted; without, rows need none.
        add_bos: a start token goes before plain prompts.

    Raises:
        UserError: naming file, line, field and remedy for a row that cannot be used; no rows at all.
    """
    check_source("preference.path", source)
    wanted = ("chosen", "rejected") if with_rejected else ("chosen",)
    pairs = []
    for where, row in read_rows(source):
        encoded = {
            field: _encoded(row, field, where, tokenizer, longest, add_bos) for field in wanted
        }
        prompt, chosen = encoded["chosen"]
        other, rejected = encoded.get("rejected", (prompt, ()))
        if other != prompt:
            raise UserError(
                f"{where}: the turns before the last of 'chosen' and 'rejected' differ; both must answer "
                "the same prompt"
            )
        pairs.append(Pair(prompt=prompt, chosen=chosen, rejected=rejected))
    if not pairs:
        raise UserError(f"{source} holds no pairs; {_FORM}")
    return pairs


def _encoded(
    row: Row, field: str, where: str, tokenizer: Tokenizer, longest: int, add_bos: bool
) -> tuple[Ids, Ids]:
    """(prompt, completion) of one of the row's two completions, as tokens."""
    if field not in row:
        raise UserError(f"{where}: {field!r} is missing; {_FORM}")
    prompt, answer = row.get("prompt"), row[field]
    try:
        if isinstance(tokenizer, ChatTokenizer):
            turns = _turns(prompt, answer, field)
            ids = tokenizer.encode_chat(turns)
        else:
            ids = _plain(prompt, answer, field, tokenizer, add_bos)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if not ids[0] or not ids[1]:
        raise UserError(f"{where}: the prompt or {field!r} is empty; {_FORM}")
    total = len(ids[0]) + len(ids[1])
    if total > longest:
        raise UserError(
            f"{where}: prompt and {field!r} have {total} tokens together, more than "
            f"train.row_tokens={longest}; set train.row_tokens to at least {total}, or leave the row out"
        )
    return ids


def _plain(
    prompt: object, answer: object, field: str, tokenizer: Tokenizer, add_bos: bool
) -> tuple[Ids, Ids]:
    for name, value in (("prompt", prompt), (field, answer)):
        if isinstance(value, list):
            raise UserError(
                f"{name!r} is a chat; set model.chat=true and model.path to a checkpoint with a template"
            )
        if not isinstance(value, str):
            raise UserError(f"{name!r} is {value!r:.60}, not a text; {_FORM}")
    start = (tokenizer.bos_id,) if add_bos and tokenizer.bos_id is not None else ()
    completion = (*tokenizer.encode(str(answer)), tokenizer.stop_ids[0])
    return (*start, *tokenizer.encode(str(prompt))), completion


def _turns(prompt: object, answer: object, field: str) -> Sequence[Mapping[str, Any]]:
    """The whole chat, the answer last."""
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    last = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    if not isinstance(last, list) or not isinstance(before, list | None):
        raise UserError(f"'prompt' or {field!r} is neither a text nor a list of turns; {_FORM}")
    for turn in (*(before or ()), *last):
        if not isinstance(turn, dict) or not {"role", "content"} <= set(turn):
            raise UserError(
                f"a turn of {field!r} is {turn!r:.60}, without role and content; {_FORM}"
            )
    if len(last) > 1:  # written out with its prompt
        return last
    if not before:
        raise UserError(f"{field!r} has no turn before the answer and 'prompt' is missing; {_FORM}")
    return [*before, *last]
