"""Reward for an edit that resembles the reference edit (SWE-RL, arXiv:2502.18449; its code: core/reward.py).

    <think> thoughts </think> <solution>
    ```python
    ### path/to/file.py
    <<<<<<< SEARCH
    text of the file
    =======
    what it becomes
    >>>>>>> REPLACE
    ```
    </solution>

A completion without each tag once, with empty thoughts or no block, or whose search text is not in its file
or equals its replacement, gets -1; text outside the tags does not count. Else the mean over the files that
either edit changes of the similarity of both unified diffs (3 lines of context, no header lines), in [0, 1].
Standard library only; quadratic in the diffs at worst, which the pool's time limit bounds.

A row has `files` (path -> text before) and `patched` (path -> text after the reference edit).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from jaxrl.errors import UserError
from jaxrl.types import Reward

WRONG_FORM = -1.0
"""Reward of a completion that holds no edit that can be applied."""
_CONTEXT_LINES = 3
_HEADER_LINES = 2
_TAGS = ("<think>", "</think>", "<solution>", "</solution>")
_EDIT = re.compile(
    r"```[^\n]*\n### ([^\n]*)\n<<<<<<< SEARCH\n(.*?)\n=======\n(.*?)\n>>>>>>> REPLACE\n```",
    re.DOTALL,
)

Files = Mapping[str, str]
"""Path -> whole text."""


class EditError(ValueError):
    """The completion holds no edit that can be applied; the text says why."""


def read_edit(row: Mapping[str, Any]) -> tuple[Files, Files]:
    """(files before, files after the reference edit) of a row. Raises: UserError for another form."""
    for field in ("files", "patched"):
        value = row.get(field)
        if not isinstance(value, Mapping) or not all(
            isinstance(text, str) for text in value.values()
        ):
            raise UserError(
                f'{field!r} is {value!r:.60}; verifier similarity wants {{"files": {{path: text}}, '
                '"patched": {path: text}}'
            )
    if not any(_differ(row["files"].get(path, ""), text) for path, text in row["patched"].items()):
        raise UserError("'patched' changes none of the 'files'; there is no edit to resemble")
    return row["files"], row["patched"]


def score_similarity(prompt: str, completion: str, row: Mapping[str, Any]) -> Reward:
    """The similarity, or WRONG_FORM. Parts: `similarity` (0 without the form), `format`; correct: equal
    to the reference."""
    before, after = read_edit(row)
    try:
        edited = apply_edits(completion, before)
    except EditError:
        parts = {"similarity": 0.0, "format": 0.0, "correct": 0.0}
        return Reward(total=WRONG_FORM, parts=parts, correct=False)
    similarity = edit_similarity(before, edited, after)
    correct = {**before, **edited} == {**before, **after}
    parts = {"similarity": similarity, "format": 1.0, "correct": float(correct)}
    return Reward(total=similarity, parts=parts, correct=correct)


def apply_edits(completion: str, before: Files) -> dict[str, str]:
    """Texts of the files that the completion's edits name, after all of them.

    As in the paper's code a search text stands for whole lines and every place it occurs at is replaced;
    an empty one matches the beginning of a line.

    Raises: EditError.
    """
    if any(completion.count(tag) != 1 for tag in _TAGS):
        raise EditError("not one <think>...</think> and one <solution>...</solution>")
    if not _between(completion, *_TAGS[:2]).strip():
        raise EditError("no thoughts")
    edits = _EDIT.findall(_between(completion, *_TAGS[2:]))
    if not edits:
        raise EditError("no SEARCH/REPLACE block")
    edited: dict[str, str] = {}
    for path, search, replacement in edits:
        path = path.strip()
        text = "\n" + edited.get(path, before.get(path, ""))
        if search == replacement:
            raise EditError(f"search and replacement are equal in {path}")
        if "\n" + search not in text:
            raise EditError(f"the search text is not in {path}")
        edited[path] = text.replace("\n" + search, "\n" + replacement)[1:]
    return edited


def edit_similarity(before: Files, edited: Files, after: Files) -> float:
    """Mean similarity of the diffs of two edits over the files that either changes.

    The similarity of one file is 2 M / T of difflib without its heuristic for popular characters, and 0
    where one edit alone changes it. A file of which only the ends of lines change is not changed, so that
    nothing is earned by such an edit.
    """
    mine, reference = _diffs(before, edited), _diffs(before, after)
    scores = [diff_similarity(mine.get(p, ""), reference.get(p, "")) for p in {*mine, *reference}]
    return sum(scores) / len(scores)


def _between(text: str, start: str, end: str) -> str:
    """What stands between two tags; to the end of the text where `end` stands before `start`."""
    return text.partition(start)[2].partition(end)[0]


def _differ(old: str, new: str) -> bool:
    """The texts differ in more than the ends of their lines, of which a diff says nothing."""
    return old.splitlines() != new.splitlines()


def _diffs(before: Files, after: Files) -> dict[str, str]:
    """Unified diffs of the changed files."""
    changed = {path: text for path, text in after.items() if _differ(before.get(path, ""), text)}
    return {path: unified(before.get(path, ""), text) for path, text in changed.items()}


def unified(old: str, new: str) -> str:
    """The diff of two texts without its two header lines."""
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), n=_CONTEXT_LINES, lineterm="")
    return "\n".join([*lines][_HEADER_LINES:])


def diff_similarity(mine: str, reference: str) -> float:
    """2 M / T of two diffs (M characters that match, T in both together); 0 where either is empty."""
    if not mine or not reference:
        return 0.0
    return difflib.SequenceMatcher(None, mine, reference, autojunk=False).ratio()
