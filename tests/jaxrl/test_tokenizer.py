"""Tokenizers: round trips, special tokens, the real checkpoints, and clear refusals."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.errors import UserError
from jaxrl.tokenizer import CharTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer

ALPHABET = "0123456789+-*/()=: ;,"


@given(st.text(alphabet=ALPHABET))
def test_characters_round_trip_one_id_each(text: str):
    tokenizer = CharTokenizer(ALPHABET)
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert all(2 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode(ids) == tokenizer.decode(ids, continues=True) == text


def test_character_ids_do_not_depend_on_the_order_of_the_alphabet():
    assert CharTokenizer("cab").encode("abc") == CharTokenizer("abcabc").encode("abc") == [2, 3, 4]
    assert CharTokenizer("abc").vocab_size == 5


def test_pad_and_stop_of_the_character_tokenizer_give_no_text():
    tokenizer = CharTokenizer("ab")
    assert (tokenizer.pad_id, tokenizer.stop_ids, tokenizer.bos_id) == (0, (1,), None)
    assert tokenizer.decode([0, 2, 3, 1, 0]) == "ab"


@pytest.mark.parametrize("bad", [-1, 4])
def test_ids_outside_the_vocabulary_are_an_error(bad: int):
    with pytest.raises(ValueError, match=r"outside 0\.\.3"):
        CharTokenizer("ab").decode([2, bad])


def test_characters_outside_the_alphabet_are_named():
    with pytest.raises(UserError, match="'x' of '1x' is not in the tokenizer's alphabet"):
        CharTokenizer("12").encode("1x")
    with pytest.raises(UserError, match="empty"):
        CharTokenizer("")


@pytest.fixture(scope="session")
def stories(shared_data: Path) -> Tokenizer:
    return load_tokenizer(shared_data / "weights" / "stories260K")


def test_the_greedy_text_of_the_checkpoint_is_reproduced(shared_data: Path, stories: Tokenizer):
    path = shared_data / "weights" / "stories260K" / "expected_greedy.json"
    expected = json.loads(path.read_text())
    assert stories.decode(expected["token_ids"]) == expected["text"]
    assert [1, *stories.encode(expected["text"])] == expected["token_ids"]


def test_start_and_end_tokens_both_stop_and_give_no_text(stories: Tokenizer):
    assert (stories.bos_id, stories.stop_ids, stories.vocab_size) == (1, (1, 2), 512)
    ids = stories.encode("Once upon a time")
    assert not {0, 1, 2} & set(ids)
    assert stories.decode([1, *ids, 2, 1]) == "Once upon a time"
    assert 0 <= stories.pad_id < stories.vocab_size


words = st.lists(
    st.sampled_from(["Lily", "was", "happy", ".", "ñandú", "\n", "日本", "3"]), min_size=1
)


@settings(deadline=None, max_examples=50)
@given(words=words, cut=st.integers(0, 40))
def test_a_text_is_its_prompt_plus_its_continuation(stories: Tokenizer, words: list[str], cut: int):
    text = " ".join(words)
    ids = stories.encode(text)
    assert stories.decode(ids) == text
    cut = min(cut, len(ids))
    head, tail = stories.decode(ids[:cut]), stories.decode(ids[cut:], continues=cut > 0)
    if "\N{REPLACEMENT CHARACTER}" not in head + tail:  # the cut went through a character's bytes
        assert head + tail == text


def test_a_second_real_checkpoint_loads(shared_data: Path):
    tokenizer = load_tokenizer(shared_data / "weights" / "babyllama_tok105")
    config = json.loads((shared_data / "weights/babyllama_tok105/config.json").read_text())
    assert tokenizer.vocab_size == config["vocab_size"]
    assert tokenizer.decode(tokenizer.encode("Tim ran home.")) == "Tim ran home."


def test_a_folder_without_a_tokenizer_says_what_is_supported(tmp_path: Path):
    with pytest.raises(UserError, match=r"has no tokenizer; supported are .*tokenizer\.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match=r"only as vocab\.json .*save_pretrained"):
        load_tokenizer(tmp_path)


def test_several_tokenizers_are_refused_unless_one_has_the_usual_name(
    tmp_path: Path, shared_data: Path
):
    model = (shared_data / "weights/stories260K/tok512.model").read_bytes()
    (tmp_path / "tok1.model").write_bytes(model)
    (tmp_path / "tok2.model").write_bytes(model)
    with pytest.raises(UserError, match=r"tok1\.model, tok2\.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(model)
    assert load_tokenizer(tmp_path).name == "tokenizer.model"


def test_a_broken_file_is_named(tmp_path: Path):
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"tokenizer\.model cannot be read"):
        SentencePieceTokenizer(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        load_tokenizer(tmp_path)
