"""Chat templates: published renderings, thinking modes, training chats, and a sandbox that holds."""

import datetime
import json
from pathlib import Path

import pytest

from jaxrl.chat import ChatTemplate, ChatTokenizer, load_chat_template
from jaxrl.errors import UserError
from jaxrl.prompts import encode_prompt
from jaxrl.tokenizer import CharTokenizer
from jaxrl.types import Problem

CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def templates(shared_data: Path) -> Path:
    return shared_data / "tokenizers" / "chat_templates"


def template(templates: Path, name: str, **tokens: str) -> ChatTemplate:
    return ChatTemplate((templates / f"{name}.jinja").read_text(), **tokens)


def test_published_renderings_are_reproduced(templates: Path):
    content = json.loads((templates / "llamacpp_chat_cases.json").read_text())
    cases = [case for case in content["cases"] if case["jinja_verified"]]
    assert len(cases) == 16
    for case in cases:
        chat = content["messages"][1:] if case["drop_system"] else content["messages"]
        rendered = ChatTemplate(
            case["template"], bos_token=case["bos_token"], eos_token=case["eos_token"]
        ).render(chat)
        assert rendered == case["expected"], case["name"]


def test_qwen3_thinks_unless_told_not_to(templates: Path):
    qwen = template(templates, "qwen3")
    start = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
    assert qwen.can_think
    for thinking in (None, True):
        text = qwen.prompt("1+1?", system="Be brief.", thinking=thinking)
        assert text == start + "<|im_start|>assistant\n"
    text = qwen.prompt("1+1?", system="Be brief.", thinking=False)
    assert text == start + "<|im_start|>assistant\n<think>\n\n</think>\n\n"


def test_smollm3_has_both_modes_and_a_fixed_date(templates: Path):
    smol = ChatTemplate((templates / "smollm3.jinja").read_text(), today=datetime.date(2024, 2, 29))
    thinking, plain = (smol.prompt("1+1?", thinking=mode) for mode in (True, False))
    assert "Today Date: 29 February 2024\nReasoning Mode: /think\n" in thinking
    assert thinking.endswith("<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n")
    assert "Reasoning Mode: /no_think\n" in plain
    assert plain.endswith("<|im_start|>assistant\n<think>\n\n</think>\n")
    flagged = smol.prompt("1+1?", system="Help. /no_think")
    assert "Reasoning Mode: /no_think" in flagged
    assert "Help.\n" in flagged


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "llama3_2", "qwen3_instruct_2507"])
def test_a_template_without_modes_refuses_one(templates: Path, name: str):
    plain = template(templates, name, bos_token="<|begin_of_text|>")
    assert not plain.can_think
    assert "1+1?" in plain.prompt("1+1?")
    with pytest.raises(UserError, match="thinking=False, but this model's chat template has no"):
        plain.prompt("1+1?", thinking=False)


def test_the_start_token_is_in_the_text(templates: Path):
    llama = template(templates, "llama3", bos_token="<|begin_of_text|>")
    assert llama.prompt("Hi").startswith("<|begin_of_text|><|start_header_id|>user")


@pytest.mark.parametrize("name", ["qwen3", "smollm3", "qwen2_5", "llama3", "gemma"])
def test_a_training_chat_splits_into_its_prompt_and_the_answer(templates: Path, name: str):
    chat = template(templates, name, bos_token="<bos>")
    prompt, completion = chat.split(CHAT)
    assert prompt == chat.prompt("Hi")
    assert prompt + completion == chat.render(CHAT, reply=False)
    assert "Hello" in completion
    if chat.can_think:
        prompt, completion = chat.split(CHAT, thinking=False)
        assert prompt.endswith("</think>\n\n" if name == "qwen3" else "</think>\n")
        assert completion == "Hello<|im_end|>\n"


def test_a_training_chat_ends_with_the_assistant(templates: Path):
    with pytest.raises(UserError, match="must be the assistant's"):
        template(templates, "qwen3").split(CHAT[:1])


def test_a_template_that_rewrites_the_prompt_is_refused():
    rewriting = ChatTemplate("{{ messages | length }} {{ messages[0].content }}")
    with pytest.raises(UserError, match="writes a chat with its answer differently"):
        rewriting.split(CHAT)


def test_generation_marks_are_part_of_the_text():
    assert ChatTemplate(CHATML).render(CHAT, reply=False) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    )


def test_a_template_reads_tools_and_writes_json_unescaped():
    text = ChatTemplate("{% for t in tools %}{{ t | tojson }}{% endfor %}").render(
        CHAT, tools=[{"name": "<é>"}]
    )
    assert text == '{"name": "<é>"}'


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ strftime_now.__self__.__class__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% include 'secret' %}",
    ],
)
def test_a_template_reaches_nothing_but_its_data(source: str):
    with pytest.raises(UserError, match="the chat template refuses this chat"):
        ChatTemplate(source).render(CHAT)


def test_internals_are_simply_not_there():
    for source in ("{{ raise_exception.__globals__ }}", "{{ namespace.__init__ }}"):
        assert ChatTemplate(source).render(CHAT) == ""


def test_refusals_name_the_reason_and_the_roles():
    picky = ChatTemplate("{{ raise_exception('no system turn') }}")
    with pytest.raises(UserError, match=r"\(no system turn\); roles: \['user', 'assistant'\]"):
        picky.render(CHAT)
    with pytest.raises(UserError, match="no valid jinja"):
        ChatTemplate("{% if %}")


def test_the_template_of_a_checkpoint_is_found_in_each_of_its_places(tmp_path: Path):
    with pytest.raises(UserError, match="has no chat template"):
        load_chat_template(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    named = [
        {"name": "tool_use", "template": "a"},
        {"name": "default", "template": "b{{ bos_token }}"},
    ]
    settings.write_text(json.dumps({"chat_template": named, "bos_token": {"content": "<s>"}}))
    assert load_chat_template(tmp_path).prompt("") == "b<s>"
    settings.write_text(json.dumps({"chat_template": "c{{ eos_token }}", "eos_token": "</s>"}))
    assert load_chat_template(tmp_path).prompt("") == "c</s>"
    (tmp_path / "chat_template.jinja").write_text("d")
    assert load_chat_template(tmp_path).prompt("") == "d"


def test_prompts_of_a_chat_are_its_user_turn_and_solutions_stay_plain(templates: Path):
    plain = CharTokenizer("".join(map(chr, range(32, 127))) + "\n")
    chat = ChatTokenizer(plain, template(templates, "qwen3"), system="Add.", thinking=False)
    problem = Problem(id=1, prompt="1+1?", answer="2", solution="2")
    tokens = encode_prompt(problem, chat, 200, chat.bos_id is not None)
    assert chat.decode(tokens) == template(templates, "qwen3").prompt(
        "1+1?", system="Add.", thinking=False
    )
    assert chat.encode("2") == plain.encode("2")
    assert (chat.vocab_size, chat.stop_ids, chat.pad_id) == (98, (1,), 0)
    with pytest.raises(UserError, match="has no such modes"):
        ChatTokenizer(plain, ChatTemplate(CHATML), thinking=True)
