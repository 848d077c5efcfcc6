"""Tasks from files: forms of rows, sources, splits by the problem's hash, verifiers by name, limits."""

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from jaxrl.chat import ChatTemplate, ChatTokenizer
from jaxrl.cli import load_config, resolve_config
from jaxrl.config import TaskConfig
from jaxrl.errors import UserError
from jaxrl.plan import make_plan
from jaxrl.prompts import encode_prompt
from jaxrl.rewards.pool import RewardPool
from jaxrl.tasks import make_task
from jaxrl.tasks.base import Split, split_of
from jaxrl.tokenizer import HuggingFaceTokenizer
from jaxrl.types import Problem
from roofline.datasheets import datasheet
from roofline.model_zoo import find_model

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
WORDS = [
    {
        "question": f"Ann has {i} pens and buys {i} more. How many pens has she?",
        "answer": f"She has {i}+{i} = <<{i}+{i}={2 * i}>>{2 * i} pens.\n#### {2 * i}",
    }
    for i in range(1, 101)
]
SQUARE = {
    "prompt": "Write a function to square a number.",
    "test_list": ["assert square(3) == 9"],
    "code": "def square(x):\n    return x * x",
}
VERDICT_S = 60.0  # a verdict takes milliseconds once its process has started


def write(path: Path, rows: Sequence[object]) -> Path:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("words") / "words.jsonl.gz", WORDS)


def everything(config: TaskConfig, seed: int = 0) -> list[Problem]:
    task = make_task(config, seed)
    return [problem for split in SPLITS for problem in task.problems(split)]


def only(tmp_path: Path, row: dict[str, Any], **settings: Any) -> Problem:
    """The problem that one row makes, whatever its split."""
    path = write(tmp_path / "one.jsonl", [row])
    task = make_task(TaskConfig(path=path, **settings), 0)
    for split in SPLITS:
        try:
            return task.problems(split)[0]
        except UserError as error:
            if "falls into" not in str(error):
                raise
    raise AssertionError("in no split")


def test_gsm8k_boxes_the_result_and_drops_the_calculators_marks(words: Path):
    problems = everything(TaskConfig(name="gsm8k", path=words))
    assert len(problems) == len(WORDS)
    (problem,) = (p for p in problems if p.answer == "14")
    assert problem.solution == "She has 7+7 = 14 pens.\nThe answer is \\boxed{14}."
    assert problem.prompt.startswith("Ann has 7 pens")
    assert problem.prompt.endswith("final answer within \\boxed{}.")
    assert problem.row["answer"] == "14"


def test_math_takes_the_answer_from_its_field_or_from_the_solutions_box(tmp_path: Path):
    row = {"problem": "Half of one?", "solution": "It is $\\boxed{\\frac{1}{2}}$."}
    assert only(tmp_path, row, name="math").answer == "\\frac{1}{2}"
    problem = only(tmp_path, {**row, "answer": "0.5"}, name="math")
    assert problem.answer == problem.row["answer"] == "0.5"
    with pytest.raises(UserError, match=r"line 1: there is no 'answer'"):
        only(tmp_path, {"problem": "?", "solution": "It is 2."}, name="math")


def test_code_shows_what_names_the_function_and_fences_the_solution(tmp_path: Path):
    problem = only(tmp_path, SQUARE, name="code")
    assert "assert square(3) == 9" in problem.prompt
    assert problem.solution == f"```python\n{SQUARE['code']}\n```"
    stub = "def cube(x):\n"
    row = {
        "prompt": stub, "entry_point": "cube", "canonical_solution": "    return x**3\n",
        "test": "def check(f):\n    assert f(2) == 8\n",
    }  # fmt: skip
    problem = only(tmp_path, row, name="code")
    assert stub in problem.prompt
    assert problem.solution == "```python\ndef cube(x):\n    return x**3\n```"
    row = {"problem": "Double it.", "inputs": ["2"], "outputs": ["4"]}
    assert "standard input" in only(tmp_path, row, name="code").prompt
    with pytest.raises(UserError, match="line 1: a row for the code verifier"):
        only(tmp_path, {"prompt": "Write."}, name="code")


def test_the_template_replaces_the_prompt_and_nothing_else(words: Path):
    plain = TaskConfig(name="gsm8k", path=words, prompt_template="Q: {problem}\nA: \\boxed{")
    own = TaskConfig(name="gsm8k", path=words)
    for one, other in zip(everything(plain), everything(own), strict=True):
        assert one.id == other.id
        assert one.prompt == f"Q: {other.row['question']}\nA: \\boxed{{"
    with pytest.raises(UserError, match=r"lacks \{problem\}"):
        TaskConfig(prompt_template="Q: {question}")


def test_a_problems_hash_decides_its_split_under_every_seed(words: Path):
    config = TaskConfig(name="gsm8k", path=words)
    one, other = make_task(config, seed=0), make_task(config, seed=1)
    for split in SPLITS:
        ids = [problem.id for problem in one.problems(split)]
        assert {split_of(i) for i in ids} == {split}
        assert ids != [problem.id for problem in other.problems(split)]
        assert set(ids) == {problem.id for problem in other.problems(split)}


def test_a_test_file_is_the_test_split_and_is_kept_out_of_training(words: Path, tmp_path: Path):
    held_out = [*WORDS[:10], {"question": "1+1?", "answer": "#### 2"}]
    test = write(tmp_path / "test.jsonl", held_out)
    task = make_task(TaskConfig(name="gsm8k", path=words, test_path=test), 0)
    questions = {s: {p.row["question"] for p in task.problems(s)} for s in SPLITS}
    assert questions["test"] == {row["question"] for row in held_out}
    rest = {row["question"] for row in WORDS[10:]}
    assert questions["train"] | questions["validation"] == rest
    assert not questions["train"] & questions["validation"]
    assert {split_of(p.id) for p in task.problems("validation")} == {"validation"}


def test_long_problems_are_left_out_by_prompt_and_by_solution(tmp_path: Path):
    wordy = {**WORDS[0], "answer": f"{'Well, ' * 20}\n#### 2", "question": "1+1?"}
    path = write(tmp_path / "words.jsonl", [*WORDS, wordy])
    most = max(len(row["question"]) for row in WORDS) - 1
    task = TaskConfig(name="gsm8k", path=path, max_chars=most, prompt_template="{problem}")
    kept = {p.row["question"] for p in everything(task)}
    assert kept == {row["question"] for row in WORDS if len(row["question"]) <= most}
    assert len(kept) == 99


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"name": "gsm8k", "verifier": "code"}, "cannot judge task gsm8k; use math or exact"),
        ({"name": "code", "verifier": "math"}, "cannot judge task code; use code"),
        (
            {"name": "jsonl", "verifier": "maths"},
            "cannot judge task jsonl; use exact or math or code",
        ),
        ({"name": "jsonl", "verifier": "gone.py:score"}, "there is no file"),
        ({"name": "arithmetic", "verifier": "math"}, "has its own exact check"),
    ],
)
def test_a_verifier_that_cannot_judge_is_refused(words: Path, settings: Any, says: str):
    with pytest.raises(UserError, match=says):
        make_task(TaskConfig(path=words, **settings), 0)


def test_the_time_limit_of_a_verdict_must_exceed_that_of_a_program():
    with pytest.raises(UserError, match=r"task\.reward_timeout_s=10\.0 .* to 15\.0 or more"):
        TaskConfig(name="code", reward_timeout_s=10.0)
    with pytest.raises(UserError, match=r"task\.code_wall_s=20\.0"):
        TaskConfig(verifier="code", code_wall_s=20.0)
    assert TaskConfig(name="math", reward_timeout_s=10.0).judge == "math"


@pytest.fixture(scope="module")
def judged(words: Path) -> Iterator[RewardPool]:
    config = TaskConfig(name="gsm8k", path=words)
    with RewardPool(config, 0, 1, config.reward_timeout_s, 0.0) as pool:
        yield pool


def test_solutions_are_right_others_wrong_and_what_was_cut_off_is_wrong(
    judged: RewardPool, words: Path
):
    problems = everything(TaskConfig(name="gsm8k", path=words))[:20]
    items = [(p, p.solution, True) for p in problems]
    items += [(p, problems[i - 1].solution, True) for i, p in enumerate(problems)]
    items += [(p, p.solution, False) for p in problems]
    rewards = judged.submit_many(items).result(VERDICT_S)
    assert [r.total for r in rewards] == [1.0] * 20 + [0.0] * 40
    assert dict(rewards[-1].parts) == {"correct": 0.0, "answered": 1.0}
    curves = judged.stats().metrics()
    assert curves["verifier/done"] >= 60
    assert curves["verifier/errors"] == curves["verifier/timeouts"] == 0


def test_code_runs_within_the_configured_limit(tmp_path: Path):
    problem = only(tmp_path, SQUARE, name="code")
    config = TaskConfig(name="code", path=tmp_path / "one.jsonl", code_wall_s=0.5)
    with RewardPool(config, 0, 1, config.reward_timeout_s, 0.0) as pool:
        hang = "```python\ndef square(x):\n    while True: pass\n```"
        items = [(problem, problem.solution, True), (problem, hang, True)]
        right, slow = pool.submit_many(items).result(VERDICT_S)
    assert right.total == 1.0
    assert slow.total == 0.0
    assert slow.parts["slow"] == 1.0


def test_a_function_of_ones_own_judges_jsonl_with_the_whole_row(tmp_path: Path):
    (tmp_path / "own.py").write_text(
        "def score(prompt, completion, answer, row):\n"
        "    return {'level': row['level'], 'hit': float(str(answer) in completion)}\n"
    )
    problem = only(tmp_path, {"prompt": "2+2=", "answer": 4, "level": 3}, name="jsonl",
                   verifier=f"{tmp_path / 'own.py'}:score")  # fmt: skip
    config = TaskConfig(
        name="jsonl", path=tmp_path / "one.jsonl", verifier=f"{tmp_path / 'own.py'}:score"
    )
    with RewardPool(config, 0, 1, 15.0, 0.0) as pool:
        (reward,) = pool.submit_many([(problem, "4!", False)]).result(VERDICT_S)
    assert reward.total == 4.0
    assert dict(reward.parts) == {"level": 3.0, "hit": 1.0}


def test_the_published_data_sets_are_read_whole(shared_data: Path):
    most = 10_000
    for name, file, size in (
        ("gsm8k", "gsm8k/gsm8k_train.jsonl.gz", 7473),
        ("math", "math/MATH_test_5000.jsonl.gz", 5000),
        ("code", "code/HumanEval.jsonl.gz", 164),
        ("code", "code/mbpp_sanitized_427.jsonl.gz", 427),
    ):
        config = TaskConfig(name=name, path=shared_data / file, num_train=most, num_eval=most)
        problems = everything(config)
        assert len(problems) == size
        assert all(p.prompt and p.solution for p in problems)


def test_training_on_math_leaves_out_the_500_of_the_test(shared_data: Path):
    math = shared_data / "math"
    config = TaskConfig(
        name="math", path=math / "MATH_test_5000.jsonl.gz", test_path=math / "MATH500.jsonl.gz",
        num_train=10_000, num_eval=10_000,
    )  # fmt: skip
    task = make_task(config, 0)
    sizes = {split: len(task.problems(split)) for split in SPLITS}
    assert sizes["test"] == 500
    assert sizes["train"] + sizes["validation"] == 4500


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("qwen3_0.6b_gsm8k_1gpu", "qwen3-0.6b"),
        ("qwen2.5_1.5b_gsm8k_1gpu", "qwen2.5-1.5b"),
        ("qwen3_4b_math_8gpu", "qwen3-4b"),
    ],
)
def test_the_gpu_configurations_fit_80_gb(name: str, model: str):
    config = load_config(resolve_config(name))
    plan = make_plan(config, find_model(model).config, datasheet("h100-80gb-sxm"))
    assert plan.samples == config.grpo.prompts_per_step * config.grpo.group_size
    assert config.mesh.devices == (8 if "8gpu" in name else 1)


def test_the_longest_prompts_fit_the_qwen_configurations(shared_data: Path, tmp_path: Path):
    folder = shared_data / "tokenizers"
    packed = (folder / "qwen3" / "tokenizer.json.gz").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(gzip.decompress(packed))
    settings = (folder / "qwen3" / "tokenizer_config.json").read_text()
    (tmp_path / "tokenizer_config.json").write_text(settings)
    plain = HuggingFaceTokenizer(tmp_path)
    for name, files, template in (
        ("qwen3_0.6b_gsm8k_1gpu", ("gsm8k_train", "gsm8k_test"), "qwen3"),
        ("qwen2.5_1.5b_gsm8k_1gpu", ("gsm8k_train", "gsm8k_test"), "qwen2_5"),
        ("qwen3_4b_math_8gpu", ("MATH_test_5000",), "qwen3"),
    ):
        config = load_config(resolve_config(name))
        source = (folder / "chat_templates" / f"{template}.jinja").read_text()
        off = False if config.model.thinking == "off" else None
        tokenizer = ChatTokenizer(plain, ChatTemplate(source), thinking=off)
        for file in files:
            path = shared_data / config.task.name / f"{file}.jsonl.gz"
            task = TaskConfig(
                name=config.task.name, path=path, num_train=10_000, num_eval=10_000,
                max_chars=config.task.max_chars,
            )  # fmt: skip
            longest = sorted(everything(task), key=lambda p: -len(p.prompt))[:40]
            for problem in longest:
                encode_prompt(problem, tokenizer, config.rollout.max_prompt_tokens, False)
