"""The code verifier: a Python program in the completion passes all the tests in the row, or not.

Three shapes of row, told apart by their keys:

    {"inputs": ["2 3\\n"], "outputs": ["5\\n"]}                  a program: standard input and output
    {"test_list": ["assert f(2) == 4"], "test_imports": []}      functions: MBPP (arXiv:2108.07732)
    {"prompt": ..., "test": ..., "entry_point": "f"}             a function: HumanEval (arXiv:2107.03374)

The program is the first fenced block that is tagged python or nothing, after `</think>` (Magistral,
arXiv:2506.10910 section 2.2); a text without any fence is a program as a whole, and for HumanEval may
also go on where the prompt ends. Expected outputs are compared here, and asserts run in a process of
their own that calls the program, so nothing that the program does in its process can make them pass.
Only the standard library can be imported.
"""

from __future__ import annotations

import ast
import builtins
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from jaxrl.errors import UserError
from jaxrl.rewards.answers import after_thinking
from jaxrl.rewards.sandbox.client import Checks, Isolation, Outcome, Sandbox
from jaxrl.rewards.sandbox.limits import AdaptiveWall, Limits
from jaxrl.types import Reward

_SHAPES = "inputs and outputs, or test_list, or prompt, test and entry_point"
_PYTHON = ("", "python", "python3", "py")
_FENCE = re.compile(r" {0,3}```+[ \t]*([\w+#.-]*)[^`]*$")


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeTests:
    """The tests of one problem: runs or checks."""

    runs: tuple[tuple[str, str], ...] = ()
    """Standard input and expected standard output."""
    checks: Checks | None = None
    stub: str = ""
    """HumanEval's prompt: stands before the program."""
    entry_point: str = ""


class CodeVerifier:
    """Scores programs in a sandbox of its own, one at a time."""

    def __init__(self, limits: Limits, adaptive: bool = False, namespaces: bool = True) -> None:
        """limits: of each run; a problem with inputs has one run per input, up to the first failure.

        adaptive: lowers limits.wall_s per test to what correct programs need (see AdaptiveWall).
        Raises: UserError where programs cannot be run safely.
        """
        self._limits = limits
        self._wall = AdaptiveWall(ceiling_s=limits.wall_s) if adaptive else None
        self._sandbox = Sandbox(namespaces)

    @property
    def isolation(self) -> Isolation:
        """What programs run in."""
        return self._sandbox.isolation

    def score(self, completion: str, tests: CodeTests) -> Reward:
        """1 if the program passes every test, else 0.

        Parts: `correct`; `code`, a program was found; `passed`, share of the tests passed, counted up to
        the first failure of runs; `slow`, a run reached the time limit.
        Raises: SandboxError if programs cannot be run; nothing that the program does.
        """
        code = extract_code(completion)
        if code is None:
            return _reward(found=False, passed=0.0, slow=False)
        program = _assemble(code, tests)
        if tests.checks is None:
            return self._score_runs(program, tests.runs)
        limits = self._limits_of(test := hash(tests.checks))
        outcome = self._sandbox.check(program, tests.checks, limits)
        passed = sum(outcome.passed) / len(tests.checks.checks)
        self._note(test, outcome, correct=passed == 1)
        return _reward(found=True, passed=passed, slow=outcome.status is None)

    def close(self) -> None:
        """End the sandbox's processes."""
        self._sandbox.close()

    def _score_runs(self, program: str, runs: Sequence[tuple[str, str]]) -> Reward:
        for number, (given, expected) in enumerate(runs):
            limits = self._limits_of(test := hash((given, expected)))
            outcome = self._sandbox.run(program, given, limits)
            correct = outcome.status == 0 and same_output(outcome.output, expected)
            self._note(test, outcome, correct)
            if not correct:
                share = number / len(runs)
                return _reward(found=True, passed=share, slow=outcome.status is None)
        return _reward(found=True, passed=1.0, slow=False)

    def _limits_of(self, test: int) -> Limits:
        return replace(self._limits, wall_s=self._wall.wall_s(test)) if self._wall else self._limits

    def _note(self, test: int, outcome: Outcome, correct: bool) -> None:
        if self._wall and correct:
            self._wall.passed(test, outcome.wall_s)


def make_score(wall_s: float, adaptive: bool) -> Callable[[str, str, Mapping[str, Any]], Reward]:
    """A function that scores (prompt, completion, row) in a sandbox of its own.

    wall_s: limit of one run [s]. adaptive: see CodeVerifier. The prompt is not used; HumanEval's is in
    the row. Parts and errors: `CodeVerifier.score` and `read_tests`.
    """
    verifier = CodeVerifier(Limits(wall_s=wall_s), adaptive)

    def score(prompt: str, completion: str, row: Mapping[str, Any]) -> Reward:
        return verifier.score(completion, read_tests(row))

    return score


def read_tests(row: Mapping[str, Any]) -> CodeTests:
    """The tests in a row. Raises: UserError if it has none of the three shapes, or no test."""
    row = {key: value for key, value in row.items() if value is not None}  # parquet's empty columns
    if "inputs" in row and "outputs" in row:
        given, expected = _texts(row, "inputs"), _texts(row, "outputs")
        if len(given) != len(expected):
            raise UserError(
                f"the row has {len(given)} inputs and {len(expected)} outputs; give one output each"
            )
        return CodeTests(runs=tuple(zip(given, expected, strict=True)))
    if "test_list" in row:
        checks = _texts(row, "test_list")
        setup = "\n".join((*row.get("test_imports", ()), row.get("test_setup_code", "")))
        return CodeTests(checks=_checks(setup, checks))
    if {"prompt", "test", "entry_point"} <= row.keys():
        stub, name = row["prompt"], row["entry_point"]
        checks = Checks(
            setup=f"{stub}\n\n{row['test']}", entries=(name,), checks=(f"check({name})",)
        )
        return CodeTests(checks=checks, stub=stub, entry_point=name)
    raise UserError(f"a row for the code verifier has the keys {sorted(row)}; it needs {_SHAPES}")


def extract_code(completion: str) -> str | None:
    """The program in a completion: its first closed python block, or all of it if it has no fence.

    None if thinking never ends, or if there are fences and no such block.
    """
    text = after_thinking(completion)
    if text is None:
        return None
    if "```" not in text:
        return text if text.strip() else None
    return next((code for tag, code in fenced_blocks(text) if tag.lower() in _PYTHON), None)


def fenced_blocks(text: str) -> list[tuple[str, str]]:
    """Closed blocks between lines of ```, in order: (tag, content). Linear in the text."""
    blocks, tag, lines = [], None, []
    for line in text.splitlines(keepends=True):
        fence = _FENCE.match(line.rstrip())
        if fence is None:
            lines.append(line)
        elif tag is None:
            tag, lines = fence[1], []
        elif fence[1]:
            lines.append(line)  # a fence with a tag does not close
        else:
            blocks.append((tag, "".join(lines)))
            tag = None
    return blocks


def same_output(output: str, expected: str) -> bool:
    """Whether two outputs are equal but for white space at the ends of lines and of the text."""
    return _lines(output) == _lines(expected)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _reward(*, found: bool, passed: float, slow: bool) -> Reward:
    correct = passed == 1
    parts = {"code": float(found), "passed": passed, "slow": float(slow)}
    return Reward(total=float(correct), parts={"correct": float(correct), **parts}, correct=correct)


def _assemble(code: str, tests: CodeTests) -> str:
    """The program: HumanEval's stub brings imports and helpers, and the code redefines or continues it."""
    if not tests.stub:
        return code
    name = re.escape(tests.entry_point)
    defines = re.search(rf"^(?:(?:async )?def {name}\b|{name}\s*=)", code, re.MULTILINE)
    return f"{tests.stub}\n\n{code}" if defines else tests.stub + code


def _texts(row: Mapping[str, Any], key: str) -> tuple[str, ...]:
    texts = row[key]
    if not isinstance(texts, Sequence) or isinstance(texts, str) or not texts:
        raise UserError(
            f"{key} of the row is {texts!r:.80}; it must be a list of at least one text"
        )
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise UserError(f"{key} of the row holds {wrong[0]!r:.80}, which is no text")
    return tuple(texts)


@lru_cache(maxsize=4096)
def _checks(setup: str, checks: tuple[str, ...]) -> Checks:
    """Checks with the names that they take from the program and the modules that they use.

    A name of Python's own is the program's only if the checks use no other name that could be: a
    program that redefines `set` changes nothing in `set(f(x)) == set(y)`.
    """
    trees = [_parse(text) for text in (setup, *checks)]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    bases = {
        n.value.id for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
    }
    modules = sorted((used - _bound(nodes)) & bases & sys.stdlib_module_names)
    free = used - _bound(nodes) - set(modules)
    entries = {name for name in free if not hasattr(builtins, name)} or free
    if not entries or (len(entries) > 1 and all(hasattr(builtins, name) for name in entries)):
        raise UserError(
            f"the tests starting with {checks[0]!r:.80} call {sorted(entries) or 'nothing'}: which "
            "function is the program's is unclear; call one that is not Python's own"
        )
    imports = "".join(f"import {name}\n" for name in modules)
    return Checks(setup=imports + setup, entries=tuple(sorted(entries)), checks=checks)


def _parse(text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except SyntaxError as error:
        raise UserError(f"the test {text!r:.80} is not Python ({error.msg}); correct it") from error


def _bound(nodes: Sequence[ast.AST]) -> set[str]:
    """Names that the tests give a value themselves."""
    names = {n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    names |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler) and node.name:
            names.add(node.name)
    return names | {(n.asname or n.name).split(".")[0] for n in nodes if isinstance(n, ast.alias)}
