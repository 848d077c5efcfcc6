"""Grade school word problems (arXiv:2110.14168), in the form of the data set openai/gsm8k.

    {"question": "...", "answer": "48/2 = <<48/2=24>>24 ...\\n#### 72"}

The worked solution is the answer's text without the marks of its calculator, with the result in a box.
"""

from __future__ import annotations

import re

from jaxrl.errors import UserError
from jaxrl.tasks.files import Form, Parsed, text
from jaxrl.tasks.rows import Row

BOXED = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
"""The prompt that Qwen's model cards give for mathematics."""
_CALCULATOR = re.compile(r"<<[^<>]*>>")


def _parse(row: Row, where: str, verifier: str) -> Parsed:
    worked, mark, result = text(row, ("answer",), where).rpartition("####")
    result = result.strip()
    if not mark or not result:
        raise UserError(f"{where}: 'answer' does not end with '#### result', as GSM8K's do")
    steps = _CALCULATOR.sub("", worked).strip()
    solution = f"{steps}\nThe answer is \\boxed{{{result}}}."
    return Parsed(
        problem=text(row, ("question",), where).strip(),
        answer=result,
        solution=solution,
        row={**row, "answer": result},
    )


GSM8K = Form(name="gsm8k", parse=_parse, template=BOXED)
