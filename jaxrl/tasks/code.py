"""Python programs against tests; the forms of rows are those of jaxrl.rewards.code.

    {"prompt", "test_list", "test_imports", "code"}                 MBPP (arXiv:2108.07732)
    {"prompt", "test", "entry_point", "canonical_solution"}         HumanEval (arXiv:2107.03374)
    {"problem", "inputs", "outputs", "solution"}                    standard input and output

MBPP's prompts name no function, so its tests are shown, as in its paper. Solutions may be left out.
"""

from __future__ import annotations

from jaxrl.errors import UserError
from jaxrl.rewards.code import read_tests
from jaxrl.tasks.files import Form, Parsed, text
from jaxrl.tasks.rows import Row


def _parse(row: Row, where: str, verifier: str) -> Parsed:
    if verifier == "code":
        try:
            read_tests(row)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    problem = text(row, ("problem", "question", "prompt", "text"), where).strip()
    if row.get("entry_point") is not None:
        whole = text(row, ("prompt",), where)
        program = whole + str(row.get("canonical_solution") or "")
        solution = program if row.get("canonical_solution") else ""
        problem = f"Complete this function:\n\n```python\n{whole.rstrip()}\n```"
    elif row.get("test_list") is not None:
        tests = "\n".join(row["test_list"])
        problem = f"{problem}\nYour code must pass these tests:\n\n```python\n{tests}\n```"
        solution = str(row.get("code") or "")
    else:
        problem += "\n\nRead from standard input and write to standard output."
        solution = str(row.get("solution") or "")
    if solution:
        solution = f"```python\n{solution.rstrip()}\n```"
    return Parsed(problem=problem, solution=solution, row=row)


CODE = Form(
    name="code",
    parse=_parse,
    template="{problem}\n\nAnswer with one program in a ```python block.",
    verifiers=("code",),
)
