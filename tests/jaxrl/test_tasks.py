"""What every task promises: distinct problems, splits by hash, accepted solutions, no jax."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxrl.config import TaskConfig
from jaxrl.errors import UserError
from jaxrl.tasks import make_task
from jaxrl.tasks.base import Split, problem_id, split_of, stable_hash

SPLITS: tuple[Split, ...] = ("train", "validation", "test")

CONFIGS = {
    "addition": TaskConfig(),
    "one digit": TaskConfig(digits=1),
    "mixed worked": TaskConfig(operators="+-*", worked=True),
    "drawn": TaskConfig(digits=4, operators="-*", worked=True, num_train=500),
    "countdown": TaskConfig(name="countdown", num_train=500, num_eval=50),
    "countdown of 5": TaskConfig(name="countdown", numbers=5, num_train=100, num_eval=20),
    "stories": TaskConfig(name="stories", num_train=500, num_eval=50),
}


@pytest.fixture(params=list(CONFIGS))
def config(request: pytest.FixtureRequest) -> TaskConfig:
    return CONFIGS[request.param]


def test_problems_are_distinct_within_and_between_splits(config: TaskConfig):
    task = make_task(config, seed=0)
    problems = [problem for split in SPLITS for problem in task.problems(split)]
    assert len({problem.id for problem in problems}) == len(problems)
    assert len({problem.prompt for problem in problems}) == len(problems)


def test_every_problem_lies_in_the_split_of_its_id(config: TaskConfig):
    task = make_task(config, seed=3)
    for split in SPLITS:
        assert task.problems(split)
        assert {split_of(problem.id) for problem in task.problems(split)} == {split}


def test_splits_have_at_most_the_configured_sizes(config: TaskConfig):
    task = make_task(config, seed=0)
    assert len(task.problems("train")) <= config.num_train
    assert len(task.problems("validation")) <= config.num_eval
    assert len(task.problems("test")) <= config.num_eval


def test_problems_repeat_for_one_seed_and_differ_between_seeds(config: TaskConfig):
    first, again = (make_task(config, seed=5).problems("train") for _ in range(2))
    assert list(first) == list(again)
    assert list(first) != list(make_task(config, seed=6).problems("train"))


def test_every_solution_is_accepted_when_finished_only(config: TaskConfig):
    task = make_task(config, seed=0)
    for problem in [*task.problems("train")[:200], *task.problems("test")]:
        assert task.verify(problem, problem.solution, True).correct
        assert task.verify(problem, problem.solution, True).total == 1.0
        assert not task.verify(problem, problem.solution, False).correct
        assert not task.verify(problem, "", True).correct


def test_the_solution_of_another_problem_is_rejected(config: TaskConfig):
    task = make_task(config, seed=0)
    problems = task.problems("train")[:100]
    others = [(p, q) for p in problems for q in problems[:5] if p.answer != q.answer]
    assert others
    assert not any(task.verify(p, q.solution, True).correct for p, q in others)


def test_the_alphabet_covers_prompts_and_solutions(config: TaskConfig):
    task = make_task(config, seed=0)
    if task.alphabet is None:
        assert config.name == "stories"
        return
    used = {c for problem in task.problems("train") for c in problem.prompt + problem.solution}
    assert used <= set(task.alphabet)


def test_the_splits_take_80_10_10_percent():
    counts = dict.fromkeys(SPLITS, 0)
    for i in range(20_000):
        counts[split_of(problem_id(f"problem {i}"))] += 1
    # three standard deviations of a binomial with 20 000 draws are at most 0.0085
    for split, share in zip(SPLITS, (0.8, 0.1, 0.1), strict=True):
        assert abs(counts[split] / 20_000 - share) < 0.0085


def test_ids_are_63_bit_and_the_same_on_every_machine():
    assert stable_hash("arithmetic 47+85=") == 1150799069003132687
    assert 0 <= problem_id("x") < 2**63


def test_a_family_shares_its_split_but_not_its_id():
    first, twin = problem_id("a", family="both"), problem_id("b", family="both")
    assert first != twin
    assert split_of(first) == split_of(twin)


def _write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    return path


@pytest.fixture
def capitals(tmp_path: Path) -> TaskConfig:
    records = [{"prompt": f"{i}? ", "answer": str(i % 7)} for i in range(200)]
    return TaskConfig(name="jsonl", path=_write(tmp_path / "p.jsonl", *records))


def test_jsonl_reads_verifies_and_splits(capitals: TaskConfig):
    task = make_task(capitals, seed=0)
    problems = [problem for split in SPLITS for problem in task.problems(split)]
    assert {problem.prompt for problem in problems} == {f"{i}? " for i in range(200)}
    problem = problems[0]
    assert task.verify(problem, f"  {problem.answer}\n", True).correct
    assert not task.verify(problem, f"{problem.answer}.", True).correct
    assert not task.verify(problem, problem.answer, False).correct
    assert task.chance_rate == 1 / 7
    assert task.alphabet == " 0123456789?"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "a", "answer": }', ["line 2", "column 27", "not JSON"]),
        ('["a", "b"]', ["line 2", "list instead of an object"]),
        ('{"prompt": "\\ud83d", "answer": "4"}', ["line 2", "half a surrogate pair"]),
        ({"prompt": "a"}, ["line 2", "'answer' is missing"]),
        ({"prompt": "a", "answer": [4]}, ["line 2", "'answer' is [4]"]),
        ({"prompt": "a", "answer": True}, ["line 2", "'answer' is True"]),
        ({"prompt": "a", "answer": None}, ["line 2", "'answer' is missing"]),
        ({"prompt": "", "answer": "4"}, ["line 2", "'prompt' is ''"]),
        ({"prompt": "a", "answer": "4", "anwser": "4"}, ["line 2", "unknown field 'anwser'"]),
        ({"prompt": "a", "answer": "4", "solution": "5"}, ["line 2", "solution is not the answer"]),
        ({"prompt": "first", "answer": "4"}, ["line 2 repeats the prompt of line 1"]),
    ],
)
def test_jsonl_names_file_line_fault_and_remedy(tmp_path: Path, line: object, says: list[str]):
    path = _write(tmp_path / "bad.jsonl", {"prompt": "first", "answer": "1"}, line)
    with pytest.raises(UserError) as error:
        make_task(TaskConfig(name="jsonl", path=path), seed=0).problems("train")
    for text in [*says, "bad.jsonl"]:
        assert text in str(error.value)


def test_jsonl_needs_an_existing_file_with_problems(tmp_path: Path):
    with pytest.raises(UserError, match=r"set task\.path"):
        make_task(TaskConfig(name="jsonl"), seed=0)
    with pytest.raises(UserError, match="no file"):
        make_task(TaskConfig(name="jsonl", path=tmp_path / "absent"), seed=0)
    empty = TaskConfig(name="jsonl", path=_write(tmp_path / "empty.jsonl", "", ""))
    with pytest.raises(UserError, match="holds no problem"):
        make_task(empty, seed=0).problems("train")
    lonely = TaskConfig(name="jsonl", path=_write(tmp_path / "one", {"prompt": "a", "answer": "b"}))
    with pytest.raises(UserError, match="add more lines"):
        [make_task(lonely, seed=0).problems(split) for split in SPLITS]
    (tmp_path / "latin").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(UserError, match="not UTF-8"):
        make_task(TaskConfig(name="jsonl", path=tmp_path / "latin"), 0).problems("train")


def test_tasks_rewards_and_tokenizer_load_no_jax():
    modules = "jaxrl.tasks, jaxrl.rewards, jaxrl.rewards.worker, jaxrl.tokenizer"
    code = (
        f"import sys, {modules}; "
        "print([m for m in ('jax', 'jaxlib', 'flax', 'grain') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.strip() == "[]"
