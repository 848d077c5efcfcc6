"""The prompt stream: epochs, exact resume, and prompts that do not fit."""

import json
import threading
from pathlib import Path

import pytest

from jaxrl.config import TaskConfig
from jaxrl.errors import UserError
from jaxrl.prompts import PromptStream, encode_prompt
from jaxrl.tasks import make_task
from jaxrl.tokenizer import CharTokenizer, load_tokenizer
from jaxrl.types import Prompt

TASK = make_task(TaskConfig(digits=1), seed=0)
PROBLEMS = TASK.problems("train")
TOKENIZER = CharTokenizer(TASK.alphabet or "")
EPOCH = len(PROBLEMS)


def _stream(seed: int = 0, problems=PROBLEMS) -> PromptStream:
    return PromptStream(problems, TOKENIZER, seed, max_prompt_tokens=8, add_bos=False)


def _draw(stream: PromptStream, count: int) -> list[Prompt]:
    return [stream.next() for _ in range(count)]


def test_each_epoch_holds_every_problem_once_in_a_new_order():
    ids = [prompt.problem.id for prompt in _draw(_stream(), 3 * EPOCH)]
    epochs = [ids[i * EPOCH : (i + 1) * EPOCH] for i in range(3)]
    assert all(sorted(epoch) == sorted(problem.id for problem in PROBLEMS) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_prompts_carry_their_index_and_tokens():
    for i, prompt in enumerate(_draw(_stream(), 5)):
        assert prompt.index == i
        assert prompt.tokens == tuple(TOKENIZER.encode(prompt.problem.prompt))


def test_the_order_depends_on_the_seed_alone():
    assert _draw(_stream(seed=1), 50) == _draw(_stream(seed=1), 50)
    assert _draw(_stream(seed=1), 50) != _draw(_stream(seed=2), 50)


@pytest.mark.parametrize("drawn", [0, 1, 7, EPOCH - 1, EPOCH, 2 * EPOCH + 3])
def test_a_restored_stream_goes_on_exactly(drawn: int):
    stream = _stream()
    _draw(stream, drawn)
    state = json.loads(json.dumps(stream.state()))
    expected = _draw(stream, EPOCH + 5)
    fresh = _stream()
    fresh.restore(state)
    assert _draw(fresh, EPOCH + 5) == expected
    stream.restore(state)  # and one that has gone on can be set back
    assert _draw(stream, EPOCH + 5) == expected
    assert expected[0].index == drawn


def test_any_position_can_be_read_without_moving_the_stream():
    drawn = _draw(_stream(), 2 * EPOCH)
    stream = _stream()
    assert [stream.at(i) for i in reversed(range(2 * EPOCH))] == drawn[::-1]
    assert stream.next() == drawn[0]


def test_a_saved_position_does_not_change_while_the_stream_goes_on():
    stream = _stream()
    state = stream.state()
    before = json.dumps(state)
    _draw(stream, 3)
    assert json.dumps(state) == before


@pytest.mark.parametrize("other", [_stream(seed=1), _stream(problems=PROBLEMS[1:])])
def test_a_position_of_another_stream_is_refused(other: PromptStream):
    with pytest.raises(UserError, match=r"other problems or another seed.*restore the task"):
        other.restore(_stream().state())


def test_a_long_prompt_is_refused_up_front_with_the_needed_size():
    with pytest.raises(
        UserError, match=r"has 4 tokens, more than rollout\.max_prompt_tokens=3; .* 4 "
    ):
        PromptStream(PROBLEMS, TOKENIZER, 0, max_prompt_tokens=3, add_bos=False)
    PromptStream(PROBLEMS, TOKENIZER, 0, max_prompt_tokens=4, add_bos=False)


def test_no_problems_and_no_start_token_are_refused():
    with pytest.raises(UserError, match=r"task\.num_train"):
        _stream(problems=())
    with pytest.raises(UserError, match="has no start token"):
        encode_prompt(PROBLEMS[0], TOKENIZER, 8, add_bos=True)


def test_the_start_token_comes_first_and_counts(shared_data: Path):
    tokenizer = load_tokenizer(shared_data / "weights" / "stories260K")
    task = make_task(TaskConfig(name="stories"), seed=0)
    problem = task.problems("train")[0]
    tokens = encode_prompt(problem, tokenizer, 128, add_bos=True)
    assert tokens == (1, *tokenizer.encode(problem.prompt))
    with pytest.raises(UserError, match=f"has {len(tokens)} tokens"):
        encode_prompt(problem, tokenizer, len(tokens) - 1, add_bos=True)


def test_drawing_starts_no_thread():
    before = threading.active_count()
    _draw(_stream(), 10)
    assert threading.active_count() == before
