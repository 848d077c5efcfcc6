"""model.path: folders and hub ids, chats, and what a run keeps about its model."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import train
from jaxrl.chat import ChatTokenizer
from jaxrl.cli import parse_args
from jaxrl.config import ModelOptions, TaskConfig
from jaxrl.errors import UserError
from jaxrl.policy import describe_policy, resolve_model
from jaxrl.tasks import Task, make_task
from jaxrl.tokenizer import CharTokenizer, load_tokenizer
from models.config import ModelConfig
from models.hf import read_config, save_policy
from models.sharding import map_parameters

ALPHABET = "0123456789+= "
CONFIG = ModelConfig(
    vocab_size=15, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_size=8, ffw_size=16,
    max_positions=64, eos_token_ids=(1,),
)  # fmt: skip


@pytest.fixture
def task() -> Task:
    return make_task(TaskConfig(digits=1), 0)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    policy = map_parameters(lambda _, a: jnp.asarray(np.ones(a.shape, np.float32)), CONFIG)
    save_policy(policy, folder)
    CharTokenizer(ALPHABET).save(folder)
    return folder


def test_a_checkpoint_folder_brings_shape_and_tokenizer(checkpoint: Path, task: Task):
    config, tokenizer = resolve_model(ModelOptions(path=checkpoint), task, 64)
    assert config == CONFIG
    assert tokenizer.encode("1+2=") == CharTokenizer(ALPHABET).encode("1+2=")
    assert tokenizer.stop_ids == (1,)


def test_weights_that_do_not_fit_end_a_run_before_anything_is_measured(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def measured(*_: object, **__: object) -> None:
        raise AssertionError("too late")

    monkeypatch.setattr(train, "cached_or_calibrate", measured)
    words = [f"--model.path={checkpoint}", f"--run.dir={tmp_path / 'run'}", "--task.digits=1"]
    words += ["--rollout.max-prompt-tokens=8", "--rollout.max-new-tokens=8"]
    with pytest.raises(AssertionError, match="too late"):
        train.run(parse_args(words), [])
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"model\.path=.*model\.safetensors cannot be read"):
        train.run(parse_args(words), [])
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_another_checkpoint_is_refused(checkpoint: Path, task: Task):
    CharTokenizer(ALPHABET + "abc").save(checkpoint)
    with pytest.raises(UserError, match="embeddings for 15 tokens, but its tokenizer has 18"):
        resolve_model(ModelOptions(path=checkpoint), task, 64)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nobody/no-such-model", "not in the local cache, and huggingface.co cannot be reached"),
        ("/no/such/folder", "is no folder and no hub id"),
    ],
)
def test_what_cannot_be_found_says_how_to_get_it(
    path: str, said: str, task: Task, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=f"model.path={path} .*{said}"):
        resolve_model(ModelOptions(path=Path(path)), task, 64)


def test_chats_need_a_template_and_say_so(checkpoint: Path, task: Task):
    with pytest.raises(UserError, match="has no chat template"):
        resolve_model(ModelOptions(path=checkpoint, chat=True), task, 64)
    (checkpoint / "chat_template.jinja").write_text("{{ messages[0].content }}=")
    _, tokenizer = resolve_model(ModelOptions(path=checkpoint, chat=True), task, 64)
    assert isinstance(tokenizer, ChatTokenizer)
    assert tokenizer.decode(tokenizer.encode_question("1+1")) == "1+1="
    for options, said in (
        (ModelOptions(path=checkpoint, chat=True, thinking="off"), "has no such modes"),
        (ModelOptions(path=checkpoint, system="Add."), "model.system is set, but model.chat is"),
        (ModelOptions(chat=True), "set model.path"),
    ):
        with pytest.raises(UserError, match=said):
            resolve_model(options, task, 64)


def test_a_run_keeps_what_its_weights_mean(checkpoint: Path, task: Task, tmp_path: Path):
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 0]}))
    for name, options in (("scratch", ModelOptions()), ("tuned", ModelOptions(path=checkpoint))):
        config, tokenizer = resolve_model(options, task, 64)
        describe_policy(options, config, tokenizer, tmp_path / name)
        kept = tmp_path / name / "model"
        assert read_config(kept) == config
        again = load_tokenizer(kept)
        assert again.encode("1+2=") == tokenizer.encode("1+2=")
        assert (again.stop_ids, again.pad_id) == (tokenizer.stop_ids, tokenizer.pad_id)
