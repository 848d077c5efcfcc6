"""Mathematics with a final answer: MATH (arXiv:2103.03874) and data sets of its form.

{"problem": "...", "answer": "\\\\frac{1}{2}", "solution": "... \\\\boxed{\\\\frac{1}{2}}"}

`question` may stand for `problem`. Without `answer`, the solution's last box is the answer.
"""

from __future__ import annotations

from jaxrl.errors import UserError
from jaxrl.rewards.answers import final_answer
from jaxrl.tasks.files import Form, Parsed, answer_text, text
from jaxrl.tasks.gsm8k import BOXED
from jaxrl.tasks.rows import Row


def _parse(row: Row, where: str, verifier: str) -> Parsed:
    solution = text(row, ("solution",), where) if row.get("solution") is not None else ""
    if row.get("answer") is not None:
        answer = answer_text(row, where)
    else:
        found = final_answer(solution)
        if found is None or found.mark == "plain":
            raise UserError(
                f"{where}: there is no 'answer', and no box in 'solution' that gives it"
            )
        answer = found.text
    return Parsed(
        problem=text(row, ("problem", "question"), where).strip(),
        answer=answer,
        solution=solution,
        row={**row, "answer": answer},
    )


MATH = Form(name="math", parse=_parse, template=BOXED)
