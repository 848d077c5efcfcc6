"""The similarity of an edit to the reference edit: the published rule, its traps, and rows it cannot use."""

import json
from pathlib import Path

import pytest

from jaxrl.config import TaskConfig
from jaxrl.errors import UserError
from jaxrl.rewards.similarity import (
    WRONG_FORM,
    diff_similarity,
    edit_similarity,
    score_similarity,
    unified,
)
from jaxrl.tasks import make_task

OLD = "a = 1\nb = 2\nc = 3\nd = 4\ne = 5\nf = 6\n"
NEW = OLD.replace("c = 3", "c = 30")
ROW = {"files": {"m.py": OLD, "n.py": "x\n"}, "patched": {"m.py": NEW}}


def edit(path: str, search: str, replacement: str) -> str:
    return f"```python\n### {path}\n<<<<<<< SEARCH\n{search}\n=======\n{replacement}\n>>>>>>> REPLACE\n```"


def said(*edits: str, thoughts: str = "hm") -> str:
    body = "\n".join(edits)
    return f"<think>{thoughts}</think>\n<solution>\n{body}\n</solution>"


def test_two_diffs_have_the_published_similarity() -> None:
    """Appendix A of the reference; the heuristic for popular characters must be off."""
    assert diff_similarity("+x = 1\n-y = 2\n", "+x = 1\n-y = 3\n") == pytest.approx(
        0.928571, abs=1e-6
    )
    long_old = "".join(f"value_{n} = {n}\n" for n in range(60))
    files = {"m": long_old}
    same = edit_similarity(
        files, {"m": long_old.replace("_7 ", "_q ")}, {"m": long_old.replace("_7 ", "_r ")}
    )
    assert same > 0.9


def test_a_diff_has_three_lines_of_context_and_no_header() -> None:
    assert unified(OLD, NEW).splitlines() == [
        "@@ -1,6 +1,6 @@", " a = 1", " b = 2", "-c = 3", "+c = 30", " d = 4", " e = 5", " f = 6",
    ]  # fmt: skip


def test_the_reference_edit_gets_one_and_counts_as_correct() -> None:
    reward = score_similarity("", said(edit("m.py", "c = 3", "c = 30")), ROW)
    assert (reward.total, reward.correct) == (1.0, True)


def test_another_edit_gets_its_similarity() -> None:
    reward = score_similarity("", said(edit("m.py", "c = 3", "c = 31")), ROW)
    mine, reference = unified(OLD, OLD.replace("c = 3", "c = 31")), unified(OLD, NEW)
    matched = len(reference) - 1  # one character differs, both are equally long
    assert len(mine) == len(reference)
    assert reward.total == pytest.approx(2 * matched / (2 * len(reference)))
    assert not reward.correct


def test_a_file_that_one_edit_alone_changes_counts_zero() -> None:
    both = said(edit("m.py", "c = 3", "c = 30"), edit("n.py", "x", "y"))
    assert score_similarity("", both, ROW).total == pytest.approx(0.5)
    assert score_similarity("", said(edit("n.py", "x", "y")), ROW).total == 0.0


def test_edits_of_one_file_follow_each_other() -> None:
    twice = said(edit("m.py", "c = 3", "c = 7"), edit("m.py", "c = 7", "c = 30"))
    assert score_similarity("", twice, ROW).total == 1.0


GOOD = edit("m.py", "c = 3", "c = 30")


def test_text_around_the_tags_and_between_them_does_not_count() -> None:
    """As in the paper's code, which counts each tag and takes what is between."""
    spoken = said(GOOD).replace("<solution>", "So:\n<solution>")
    assert score_similarity("", f"Sure. {spoken} Done.", ROW).total == 1.0


def test_an_edit_of_line_ends_alone_earns_nothing() -> None:
    row = {"files": {**ROW["files"], "n.py": "x = 1\n"}, "patched": ROW["patched"]}
    half = said(edit("m.py", "c = 3", "c = 31"))
    padded = said(edit("m.py", "c = 3", "c = 31"), edit("n.py", "x = 1", "x = 1\r"))
    assert 0 < score_similarity("", half, row).total < 1
    assert score_similarity("", padded, row).total == score_similarity("", half, row).total


@pytest.mark.parametrize(
    "completion",
    [
        "",
        GOOD,
        f"<solution>{GOOD}</solution>",
        said(GOOD, thoughts=" \n"),
        said(GOOD) + said(GOOD),
        said(GOOD).replace("</solution>", ""),
        said("no block"),
        said(edit("m.py", "c = 4", "c = 30")),
        said(edit("m.py", "c = 3", "c = 3")),
        said(edit("m.py", "= 3", "= 30")),  # not at the beginning of a line
        said(edit("o.py", "c = 3", "c = 30")),
        said(GOOD, edit("m.py", "zzz", "y")),
    ],
    ids=[
        "empty", "no tags", "no thoughts", "empty thoughts", "twice", "unclosed", "no block",
        "search not found", "nothing replaced", "within a line", "no such file", "one bad of two",
    ],
)  # fmt: skip
def test_whatever_cannot_be_applied_gets_minus_one(completion: str) -> None:
    reward = score_similarity("", completion, ROW)
    assert (reward.total, reward.correct) == (WRONG_FORM, False)


def task(tmp_path: Path, *rows: dict):
    path = tmp_path / "edits.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_task(TaskConfig(name="jsonl", path=path, verifier="similarity"), 0)


def test_a_task_is_judged_by_it_and_a_cut_completion_is_not_spared(tmp_path: Path) -> None:
    made = task(tmp_path, *({"prompt": f"fix {n}", **ROW} for n in range(60)))
    problem = made.problems("train")[0]
    made.load_verifier()
    assert made.verify(problem, said(GOOD), True).total == 1.0
    assert made.verify(problem, said(GOOD)[:40], False).total == WRONG_FORM


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"files": {"m": "a"}}, "'patched' is None"),
        ({"files": "a", "patched": {}}, "'files' is 'a'"),
        ({"files": {"m": "a"}, "patched": {"m": "a"}}, "changes none of the 'files'"),
        ({"files": {"m": "a"}, "patched": {"m": "a\n"}}, "changes none of the 'files'"),
    ],
)
def test_a_row_without_an_edit_is_named_by_its_line(tmp_path: Path, row: dict, part: str) -> None:
    with pytest.raises(UserError) as refused:
        task(tmp_path, {"prompt": "p", **ROW}, {"prompt": "q", **row}).problems("train")
    assert "line 2" in str(refused.value)
    assert part in str(refused.value)
