"""Where problems come from: files, parquet, data sets, repeated rows, and what the plan says of them."""

import gzip
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxrl.build import problem_rows
from jaxrl.config import Config, EvalConfig, TaskConfig
from jaxrl.errors import UserError
from jaxrl.tasks import make_task
from jaxrl.tasks.base import Split
from jaxrl.tasks.files import FileTask
from jaxrl.types import Problem

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
WORDS = [{"question": f"What is {i}+{i}?", "answer": f"#### {2 * i}"} for i in range(1, 101)]


def write(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def everything(config: TaskConfig) -> list[Problem]:
    task = make_task(config, 0)
    return [problem for split in SPLITS for problem in task.problems(split)]


def test_a_row_that_repeats_a_problem_is_left_out_unless_it_contradicts(tmp_path: Path):
    rows = [{"prompt": f"{i}+1=", "answer": i + 1} for i in range(60)]
    path = write(tmp_path / "rows.jsonl", [*rows, rows[3], {**rows[4], "answer": "5"}])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as some editors begin a file
    task = make_task(TaskConfig(name="jsonl", path=path, verifier="math"), 0)
    problems = [problem for split in SPLITS for problem in task.problems(split)]
    assert len(problems) == len({p.id for p in problems}) == len(rows)
    assert {(p.prompt, p.row["answer"]) for p in problems} == {
        (f"{i}+1=", str(i + 1)) for i in range(60)
    }
    assert isinstance(task, FileTask)
    assert task.num_repeated == 2
    write(path, [*rows, {**rows[4], "answer": "6"}])
    with pytest.raises(UserError, match=r"line 61 repeats the prompt of line 5, but is judged by"):
        everything(TaskConfig(name="jsonl", path=path, verifier="math"))
    own = write(tmp_path / "own.jsonl", [*rows, rows[3], {**rows[4], "level": 2}])
    (tmp_path / "own.py").write_text("def score(prompt, completion, answer, row): return 0")
    with pytest.raises(UserError, match="line 62 repeats the prompt of line 5"):
        everything(TaskConfig(name="jsonl", path=own, verifier=f"{tmp_path / 'own.py'}:score"))


def test_the_plan_says_how_many_problems_there_are_and_what_is_left_out(tmp_path: Path):
    path = write(tmp_path / "words.jsonl", [*WORDS, WORDS[0]])
    task = TaskConfig(name="gsm8k", path=path, num_train=50, num_eval=5)
    subject: Any = SimpleNamespace(task=make_task(task, 0))
    ((name, count, said),) = problem_rows(Config(task=task, eval=EvalConfig(problems=3)), subject)
    assert (name, count) == ("problems", "50")
    assert said == (
        "to train; held out are 3 during the run, 5 before and after; task.num_train=50 allows no "
        "more; 1 rows that repeat a problem are left out"
    )


def test_real_parquet_with_empty_columns_is_read(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"prompt": f"{i}+1=", "answer": i + 1, "solution": None} for i in range(60)]
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    problems = everything(TaskConfig(name="jsonl", path=path, verifier="math"))
    assert {(p.prompt, p.answer) for p in problems} == {(f"{i}+1=", str(i + 1)) for i in range(60)}
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read as parquet"):
        everything(TaskConfig(name="jsonl", path=path))


def test_a_real_data_set_is_read_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("datasets")
    folder = tmp_path / "me" / "words"
    folder.mkdir(parents=True)
    write(folder / "train.jsonl", WORDS)
    monkeypatch.chdir(tmp_path)
    problems = everything(TaskConfig(name="gsm8k", path=Path("me/words:train")))
    assert {p.row["question"] for p in problems} == {row["question"] for row in WORDS}
    with pytest.raises(UserError, match=r"data set me/gone:train cannot be had"):
        everything(TaskConfig(name="gsm8k", path=Path("me/gone:train")))


def test_what_is_no_source_is_refused_before_anything_is_read(tmp_path: Path):
    for path in ("absent.jsonl", "openai/gsm8k", "a:b:c"):
        with pytest.raises(UserError, match=r"task\.path=.* is no file; give a \.jsonl"):
            make_task(TaskConfig(name="gsm8k", path=Path(path)), 0)
    with pytest.raises(UserError, match=r"set task\.path"):
        make_task(TaskConfig(name="math"), 0)
    path = tmp_path / "cut.jsonl.gz"
    packed = gzip.compress(b'{"prompt": "a"}')
    for damaged in (packed[:-9], packed[:11] + b"\xff" + packed[12:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"cut\.jsonl\.gz cannot be read"):
            everything(TaskConfig(name="jsonl", path=path))


def test_parquet_is_read_through_pyarrow_and_its_absence_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = write(tmp_path / "words.parquet", [])
    config = TaskConfig(name="gsm8k", path=path)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        everything(config)
    table = SimpleNamespace(to_pylist=lambda: WORDS)
    fake = SimpleNamespace(read_table=lambda given: table if given == path else None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", fake)
    assert len(everything(config)) == len(WORDS)


def test_a_data_set_of_the_hub_is_named_with_subset_and_split(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def load_dataset(name: str, subset: str | None, *, split: str) -> list[dict[str, str]]:
        asked.append((name, subset, split))
        if name == "nobody/nothing":
            raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub")
        return WORDS

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for path in ("openai/gsm8k:main:train", "me/words:test"):
        assert len(everything(TaskConfig(name="gsm8k", path=Path(path)))) == len(WORDS)
    assert set(asked) == {("openai/gsm8k", "main", "train"), ("me/words", None, "test")}
    with pytest.raises(UserError, match="nothing:train cannot be had: Couldn't reach"):
        everything(TaskConfig(name="gsm8k", path=Path("nobody/nothing:train")))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        everything(TaskConfig(name="gsm8k", path=Path("openai/gsm8k:main:train")))
