"""Problems from a file of your own, one JSON object per line.

    {"prompt": "2+2=", "answer": "4"}
    {"prompt": "capital of France?", "answer": "Paris", "solution": "Paris"}

Judged by task.verifier. exact, the default, wants an answer and no other fields than these and
`curation`, which python -m jaxrl.curate writes; other verifiers see the whole row, and code, similarity
and functions of your own need no answer. An answer may be a number: it counts as its text.
"""

from __future__ import annotations

from jaxrl.errors import UserError
from jaxrl.rewards.similarity import read_edit
from jaxrl.tasks.files import Form, Parsed, answer_text, text
from jaxrl.tasks.rows import Row

_FIELDS = ("prompt", "answer", "solution", "curation")


def _parse(row: Row, where: str, verifier: str) -> Parsed:
    try:
        return _parsed(row, where, verifier)
    except UserError as error:
        form = 'write {"prompt": "...", "answer": "..."} and, if wanted, "solution"'
        raise UserError(f"{error}; {form}") from error


def _parsed(row: Row, where: str, verifier: str) -> Parsed:
    prompt = text(row, ("prompt",), where)
    if verifier == "similarity":
        try:
            read_edit(row)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    if verifier not in ("exact", "math"):
        answer, solution = row.get("answer"), row.get("solution")
        return Parsed(
            problem=prompt,
            answer="" if answer is None else str(answer),
            solution=str(solution or ""),
            row=row,
        )
    answer = answer_text(row, where)
    row = {**row, "answer": answer}
    if verifier == "math":
        solution = text(row, ("solution", "answer"), where)
        return Parsed(problem=prompt, answer=answer, solution=solution, row=row)
    if unknown := sorted(set(row) - set(_FIELDS)):
        raise UserError(f"{where}: unknown field {unknown[0]!r}")
    solution = text(row, ("solution", "answer"), where)
    if solution.strip() != answer.strip():
        raise UserError(
            f"{where}: the solution is not the answer, so the verifier (exact match of stripped "
            "text) would reject it; make them equal or drop the solution"
        )
    return Parsed(problem=prompt, answer=answer, solution=solution, row=row)


JSONL = Form(
    name="jsonl",
    parse=_parse,
    template="{problem}",
    verifiers=("exact", "math", "code", "similarity"),
    from_scratch=True,
)
