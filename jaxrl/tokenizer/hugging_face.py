"""tokenizer.json through the `tokenizers` library, and the files beside it that say what it means."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers

from jaxrl.errors import UserError

TOKENIZER_FILE = "tokenizer.json"


class HuggingFaceTokenizer:
    """The tokenizer of a checkpoint, from its tokenizer.json.

    stop_ids: eos_token_id of generation_config.json, else of config.json, else eos_token of
    tokenizer_config.json. bos_id: the token that the tokenizer itself puts before a text; None for
    those that put none there (Qwen, GPT-2), even if they name one.
    """

    def __init__(self, folder: Path) -> None:
        """Raises: UserError for files that cannot be read, or without any stop token."""
        path = folder / TOKENIZER_FILE
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(
                f"{path} cannot be read as a tokenizer ({error}); fetch the file again"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        settings = read_settings(folder / "tokenizer_config.json")
        self.name = f"tokens of {folder.name}/{TOKENIZER_FILE}"
        self._size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.bos_id = self._start(settings)
        self.stop_ids = self._stops(folder, settings)
        pad = self._id_of(special_token(settings, "pad_token"))
        self.pad_id = self.stop_ids[0] if pad is None else pad
        self._anchor = next(i for i in range(self._size) if self._text([i]).isalnum())

    @property
    def vocab_size(self) -> int:
        """V of the tokenizer; a model's may be larger, padded to a round number [tokens]."""
        return self._size

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without start or stop tokens; special tokens written out in it count as
        such, as in a rendered chat template."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], *, continues: bool = False) -> str:
        """Text of the ids; see Tokenizer.decode. Bytes that are no UTF-8 become U+FFFD; an id that
        only the model's padded vocabulary has gives no text."""
        if not continues:
            return self._text([int(i) for i in ids])
        whole = self._text([self._anchor, *(int(i) for i in ids)])
        return whole[len(self._text([self._anchor])) :]

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _id_of(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token) if token else None

    def _start(self, settings: dict[str, Any]) -> int | None:
        adds = settings.get("add_bos_token")
        if adds is None:
            return next(iter(self._tokenizer.encode("", add_special_tokens=True).ids), None)
        return self._id_of(special_token(settings, "bos_token")) if adds else None

    def _stops(self, folder: Path, settings: dict[str, Any]) -> tuple[int, ...]:
        for name in ("generation_config.json", "config.json"):
            ids = read_settings(folder / name).get("eos_token_id")
            if ids not in (None, []):
                break
        else:
            ids = self._id_of(special_token(settings, "eos_token"))
        if ids is None:
            raise UserError(
                f"{folder} names no stop token; give generation_config.json an eos_token_id"
            )
        stops = tuple(sorted({ids} if isinstance(ids, int) else set(ids)))
        if not 0 <= stops[0] <= stops[-1] < self._size:
            raise UserError(
                f"{folder} has stop tokens {stops}, but {TOKENIZER_FILE} has ids 0..{self._size - 1}; "
                "correct eos_token_id in generation_config.json"
            )
        return stops


def read_settings(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint; empty where there is no such file.

    Raises: UserError naming the file if it holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; fetch it again")
    return content


def special_token(settings: dict[str, Any], name: str) -> str:
    """A special token of tokenizer_config.json as text, which may stand there as an object; empty
    where there is none."""
    token = settings.get(name)
    if isinstance(token, dict):
        token = token.get("content")
    return token or ""
