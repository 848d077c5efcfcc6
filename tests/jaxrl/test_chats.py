"""Of a chat exactly the assistant's words have loss, in the template's own form."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxrl.chat import ChatTemplate
from jaxrl.chats import Chat, Renderer, read_chats, to_sequences
from jaxrl.errors import UserError
from jaxrl.tokenizer import CharTokenizer

LETTERS = "".join(map(chr, range(32, 127))) + "\n"
PLAIN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}~\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}~\n{% endfor %}"
)
FORGETS = (  # as Qwen3: an earlier answer is written without what stands before the bar
    "{% for m in messages %}[{{ m.role }}]{{ m.content if loop.last else m.content.split('|')[-1] }}~\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
TALK = [
    {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "so|4"},
    {"role": "user", "content": "sure?"}, {"role": "assistant", "content": "yes|4!"},
]  # fmt: skip


class Letters(CharTokenizer):
    """One token per character; ~ ends a turn."""

    def __init__(self) -> None:
        super().__init__(LETTERS)
        self.stop_ids = (self.encode("~")[0],)


TOKENIZER = Letters()


def chats(
    rows: list[object], template: str | None, tmp_path: Path, *, longest: int = 100,
    skip_long: bool = False, **kwargs,
) -> tuple[list[Chat], int]:  # fmt: skip
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    compiled = None if template is None else ChatTemplate(template)
    renderer = Renderer(tokenizer=TOKENIZER, template=compiled, **kwargs)
    return read_chats(path, renderer, longest=longest, skip_long=skip_long)


def learnt(chat: Chat) -> str:
    """The chat's text, with _ for every character that has no loss."""
    text = TOKENIZER.decode(chat.tokens.tolist())
    return "".join(c if on else "_" for c, on in zip(text, chat.learnt, strict=True))


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_every_turn_of_the_assistant_is_learnt_up_to_its_stop_token(template: str, tmp_path: Path):
    (chat,), _ = chats([{"messages": TALK}], template, tmp_path)
    assert TOKENIZER.decode(chat.tokens.tolist()) == (
        "[user]2+2?~\n[assistant]so|4~\n[user]sure?~\n[assistant]yes|4!~\n"
    )
    assert learnt(chat).replace("_", "") == "so|4~yes|4!~"
    assert learnt(chat)[len("[user]2+2?~\n[assistant]") :].startswith("so|4~_")
    assert chat.prompt.endswith("sure?~\n[assistant]")
    assert TOKENIZER.decode(chat.tokens[: chat.prompt_tokens].tolist()) == chat.prompt


def test_a_template_that_forgets_makes_a_sequence_of_each_turn(tmp_path: Path):
    first, second = chats([{"messages": TALK}], FORGETS, tmp_path)[0]
    assert learnt(first) == "_" * len("[user]2+2?~\n[assistant]") + "so|4~_"
    assert TOKENIZER.decode(second.tokens.tolist()).startswith("[user]2+2?~\n[assistant]4~\n[user]")
    assert learnt(second).replace("_", "") == "yes|4!~"
    assert first.position == second.position  # one row: both learnt, or both held out


def test_a_prompt_with_a_completion_is_plain_text_or_a_turn_of_a_chat(tmp_path: Path):
    row = {"prompt": "2+2=", "completion": "4"}
    (plain,), _ = chats([row], None, tmp_path)
    assert learnt(plain) == "____4~"
    (turn,), _ = chats([row], PLAIN, tmp_path, chat=True, system="Sum.")
    assert TOKENIZER.decode(turn.tokens.tolist()) == "[system]Sum.~\n[user]2+2=~\n[assistant]4~\n"
    assert learnt(turn).replace("_", "") == "4~"


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_of_a_prompt_of_turns_only_the_completion_is_learnt(template: str, tmp_path: Path):
    (chat,), _ = chats([{"prompt": TALK[:3], "completion": TALK[3:]}], template, tmp_path)
    assert learnt(chat).replace("_", "") == "yes|4!~"


def test_weights_are_a_mean_over_the_learnt_tokens_of_the_step(tmp_path: Path):
    rows = [{"prompt": "a", "completion": "b" * n} for n in (1, 5)]
    sequences = to_sequences(chats(rows, None, tmp_path)[0])
    weights = np.concatenate([s.token_weights for s in sequences])
    assert weights.sum() == pytest.approx(1)
    assert set(np.unique(weights)) == {0.0, np.float32(1 / 8)}


GOOD = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, r"has the fields text; write"),
        ({"messages": []}, r"not a list of turns"),
        ({"messages": [{"role": "human", "content": "a"}]}, r"turn 1 has the role 'human'"),
        ({"messages": [{"role": "user", "content": None}]}, r"turn 1 \(user\) has no text"),
        ({"messages": TALK[:1]}, r"no turn of the assistant"),
        ({"messages": [TALK[0], {"role": "assistant", "content": ""}]}, r"turn 2, the assistant's"),
        ({"prompt": "a", "completion": ""}, r"'completion' is empty"),
        ({"prompt": "a", "completion": 7}, r"both texts or lists"),
        (
            {"prompt": "a", "completion": "b" * 200},
            r"has 202 tokens, more than train\.row_tokens=100",
        ),
        ([1], r"a JSON list instead of an object"),
    ],
)
def test_a_bad_row_is_named_with_its_file_and_line(row: object, message: str, tmp_path: Path):
    with pytest.raises(UserError, match=rf"chats\.jsonl, line 2: .*{message}"):
        chats([GOOD, row], PLAIN, tmp_path)


def test_long_chats_are_left_out_and_counted_on_request(tmp_path: Path):
    rows = [GOOD, {"prompt": "a", "completion": "b" * 200}]
    kept, skipped = chats(rows, None, tmp_path, skip_long=True)
    assert (len(kept), skipped) == (1, 1)


def test_messages_without_a_chat_template_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="need a checkpoint with a chat template"):
        chats([{"messages": TALK}], None, tmp_path)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_training", "qwen2_5", "smollm3", "llama3_2"])
def test_templates_of_real_models_give_back_the_answers(
    name: str, shared_data: Path, tmp_path: Path
):
    source = shared_data / "tokenizers" / "chat_templates" / f"{name}.jinja"
    talk = [{**turn, "content": turn["content"].replace("|", "-")} for turn in TALK]
    made, _ = chats([{"messages": talk}], source.read_text(), tmp_path, longest=10_000)
    found = "".join(learnt(chat).replace("_", "") for chat in made)
    assert "so-4" in found
    assert found.index("so-4") < found.index("yes-4!")
    assert "sure?" not in found
    assert "2+2?" not in found
