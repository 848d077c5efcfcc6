"""tokenizer.json: published ids, special tokens, stop tokens, and text that is still growing."""

import gzip
import json
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

from jaxrl.errors import UserError
from jaxrl.tokenizer import CharTokenizer, StreamDecoder, Tokenizer, load_tokenizer

ALPHABET = "0123456789+-*/()=: ;,\n"
TEXT = "née 日本語 🦙👨\u200d👩\u200d👧 Ünïcödé, plain words\n\n  and spaces "
BROKEN = "\N{REPLACEMENT CHARACTER}"


def byte_tokenizer(folder: Path, **settings: object) -> Path:
    """A tokenizer.json with one token per byte, then <s> 256, </s> 257, <think> 258, <|end|> 259."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    out = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    out.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore
    out.decoder = decoders.ByteLevel()  # type: ignore
    out.add_special_tokens(["<s>", "</s>"])
    out.add_tokens(["<think>"])
    out.add_special_tokens(["<|end|>"])
    out.save(str(folder / "tokenizer.json"))
    content = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def bytes_only(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(byte_tokenizer(tmp_path_factory.mktemp("bytes")))


@pytest.fixture(scope="module", params=["qwen3", "gpt2", "minimind"])
def real(
    request: pytest.FixtureRequest, shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Tokenizer]:
    """A real tokenizer, by name."""
    folder = tmp_path_factory.mktemp(request.param)
    source = shared_data / "tokenizers" / request.param
    packed = (source / "tokenizer.json.gz").read_bytes()
    (folder / "tokenizer.json").write_bytes(gzip.decompress(packed))
    if (source / "tokenizer_config.json").exists():
        content = (source / "tokenizer_config.json").read_text()
        (folder / "tokenizer_config.json").write_text(content)
    else:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    return request.param, load_tokenizer(folder)


def test_published_ids_are_reproduced(real: tuple[str, Tokenizer], shared_data: Path):
    name, tokenizer = real
    lines = (shared_data / "goldens/token_cases.jsonl").read_text().splitlines()
    for case in map(json.loads, lines):
        ids = tokenizer.encode(case["text"])
        if case["tokenizer"] == name:
            assert ids == case["ids"]
        text = unicodedata.normalize("NFC", case["text"]) if name == "qwen3" else case["text"]
        assert tokenizer.decode(ids) == tokenizer.decode(ids, continues=True) == text


def test_qwen3_has_the_ids_its_publisher_states(real: tuple[str, Tokenizer]):
    name, tokenizer = real
    if name != "qwen3":
        return
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.stop_ids) == (151669, None, (151645,))
    assert tokenizer.pad_id == 151643
    assert tokenizer.encode("<|im_start|>user\nHi<|im_end|>\n") == [
        151644, 872, 198, 13048, 151645, 198,
    ]  # fmt: skip
    assert tokenizer.encode("<think>\n\n</think>\n\n") == [151667, 271, 151668, 271]
    assert tokenizer.decode([151667, 271, 151668, 151645, 151643]) == "<think>\n\n</think>"
    assert tokenizer.decode([13048, 151935]) == "Hi"  # the model's vocabulary is padded to 151936


def test_text_streams_in_whole_characters(real: tuple[str, Tokenizer]):
    _, tokenizer = real
    ids = tokenizer.encode(TEXT)
    stream = StreamDecoder(tokenizer)
    parts = [stream.push([i]) for i in ids] + [stream.finish()]
    assert not any(BROKEN in part for part in parts)
    assert "".join(parts) == tokenizer.decode(ids, continues=True)
    assert sum(bool(part) for part in parts) > len(ids) / 4


@settings(deadline=None, max_examples=60)
@given(text=st.text(max_size=30), cuts=st.lists(st.integers(1, 3), min_size=1, max_size=5))
def test_bytes_that_come_in_pieces_make_the_whole_text(
    bytes_only: Tokenizer, text: str, cuts: list[int]
):
    ids, at, parts = bytes_only.encode(text), 0, []
    stream = StreamDecoder(bytes_only, continues=False)
    while at < len(ids):
        size = cuts[len(parts) % len(cuts)]
        parts.append(stream.push(ids[at : at + size]))
        at += size
    assert "".join(parts) + stream.finish() == text


def test_bytes_that_no_character_completes_come_at_the_end(bytes_only: Tokenizer):
    ids = bytes_only.encode("a日")[:-1]
    stream = StreamDecoder(bytes_only)
    assert stream.push(ids[:1]) == "a"
    assert stream.push(ids[1:]) == ""
    assert stream.finish() == BROKEN
    assert stream.push(bytes_only.encode("b")) == "b"


def test_a_stream_of_sentencepieces_keeps_the_spaces(shared_data: Path):
    tokenizer = load_tokenizer(shared_data / "weights" / "stories260K")
    ids = tokenizer.encode("Lily saw a ñandú.\nShe ran")
    for continues in (False, True):
        stream = StreamDecoder(tokenizer, continues=continues)
        parts = [stream.push([i]) for i in ids] + [stream.finish()]
        assert "".join(parts) == tokenizer.decode(ids, continues=continues)


def test_a_decoder_that_strips_the_first_space_keeps_it_in_a_continuation(tmp_path: Path):
    vocabulary = {"<unk>": 0, "</s>": 1, "▁the": 2, "▁cat": 3, "s": 4}
    out = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    out.decoder = decoders.Sequence(steps)  # type: ignore
    out.add_special_tokens(["</s>"])
    out.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode([2, 3, 4]) == "the cats"
    assert tokenizer.decode([3, 4], continues=True) == " cats"


def test_stop_tokens_come_from_the_generation_config_first(tmp_path: Path):
    byte_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path).stop_ids == (257,)
    (tmp_path / "config.json").write_text('{"eos_token_id": 256}')
    assert load_tokenizer(tmp_path).stop_ids == (256,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [259, 257]}')
    assert load_tokenizer(tmp_path).stop_ids == (257, 259)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [260]}')
    with pytest.raises(UserError, match=r"stop tokens \(260,\), but .* ids 0\.\.259"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_any_stop_token_is_refused(tmp_path: Path):
    byte_tokenizer(tmp_path, eos_token=None)
    with pytest.raises(UserError, match="names no stop token; give generation_config"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("adds", "start"), [(True, 256), (False, None), (None, None)])
def test_the_start_token_is_the_one_the_tokenizer_puts_there(
    tmp_path: Path, adds: bool | None, start: int | None
):
    byte_tokenizer(tmp_path, add_bos_token=adds)
    assert load_tokenizer(tmp_path).bos_id == start


def test_a_template_in_the_tokenizer_itself_tells_the_start_token(tmp_path: Path):
    byte_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    inner = tokenizers.Tokenizer.from_file(str(path))
    inner.post_processor = processors.TemplateProcessing(  # type: ignore
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    inner.save(str(path))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_id == 256
    assert 256 not in tokenizer.encode("text")


def test_special_tokens_give_no_text_and_thinking_marks_do(bytes_only: Tokenizer):
    ids = [256, *bytes_only.encode("<think>hi"), 259, 257]
    assert bytes_only.decode(ids) == "<think>hi"


@given(st.text(alphabet=ALPHABET))
def test_a_saved_character_tokenizer_gives_the_same_ids(
    tmp_path_factory: pytest.TempPathFactory, text: str
):
    folder = tmp_path_factory.mktemp("characters", numbered=True)
    characters = CharTokenizer(ALPHABET)
    characters.save(folder)
    saved = load_tokenizer(folder)
    assert saved.encode(text) == characters.encode(text)
    assert saved.decode(saved.encode(text), continues=True) == text
    ours, theirs = ((t.stop_ids, t.pad_id, t.bos_id, t.vocab_size) for t in (characters, saved))
    assert ours == theirs
