"""One token per character: the tokenizer of models trained from scratch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers

from jaxrl.errors import UserError

_SPECIAL = ("<pad>", "<stop>")


class CharTokenizer:
    """One token per character of an alphabet: 0 pad, 1 stop, then the characters by code point."""

    name = "characters"
    bos_id = None
    stop_ids = (1,)
    pad_id = 0

    def __init__(self, alphabet: str) -> None:
        """Raises: UserError for an empty alphabet."""
        if not alphabet:
            raise UserError(
                "the alphabet of the character tokenizer is empty; give at least one character"
            )
        self._characters = sorted(set(alphabet))
        self._ids = {character: i for i, character in enumerate(self._characters, start=2)}

    @property
    def vocab_size(self) -> int:
        """V: the characters, pad and stop [tokens]."""
        return 2 + len(self._characters)

    def encode(self, text: str) -> list[int]:
        """One id per character. Raises: UserError for a character outside the alphabet."""
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            raise UserError(
                f"character {error.args[0]!r} of {text[:60]!r} is not in the tokenizer's alphabet "
                f"{''.join(self._characters)!r}; remove it from the text or add it to the alphabet"
            ) from error

    def decode(self, ids: Iterable[int], *, continues: bool = False) -> str:
        """The characters; `continues` changes nothing. Raises: ValueError for an id beyond V."""
        del continues
        characters = []
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} lies outside 0..{self.vocab_size - 1}")
            if i >= 2:
                characters.append(self._characters[i - 2])
        return "".join(characters)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, with which transformers, vLLM and
        `load_tokenizer` read and write the same ids."""
        vocabulary = {name: i for i, name in enumerate(_SPECIAL)} | self._ids
        out = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
        one = tokenizers.Regex(r"[\s\S]")
        out.pre_tokenizer = tokenizers.pre_tokenizers.Split(one, "isolated")  # type: ignore
        out.decoder = tokenizers.decoders.Fuse()  # type: ignore
        out.add_special_tokens(list(_SPECIAL))
        out.save(str(folder / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": _SPECIAL[self.pad_id],
            "eos_token": _SPECIAL[self.stop_ids[0]],
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
