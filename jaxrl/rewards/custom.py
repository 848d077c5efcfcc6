"""A verifier of the user's own: a Python function in a file or in an installed package.

    task.verifier: my_rewards.py:score        a file, relative to the working directory
    task.verifier: package.module:score       a module that Python finds

    def score(prompt: str, completion: str, answer: str, row: dict) -> float | dict[str, float]:
        return float(answer in completion)

It is called by keyword, in the verifier processes. A number is the reward, and the answer counts as
correct from 1 on. A mapping names parts: the reward is the part `reward`, or else the sum of the parts;
correct is the part `correct` if it is there. An exception, a value that is no finite number, and anything
else is an error that the pool reports with prompt, completion and row: never a silent 0.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import re
import resource
import sys
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from jaxrl.errors import UserError
from jaxrl.types import Reward

_PART = re.compile(r"[A-Za-z0-9_.@-]+")
_FORM = "write my_rewards.py:score or package.module:score"


def check_custom(spec: str) -> None:
    """Raise UserError if `spec` has the wrong form, or names a file or package that is not there.

    Nothing is imported but the packages around a module, so the trainer may call it.
    """
    where, _, function = spec.rpartition(":")
    if not where or not function.isidentifier():
        raise UserError(
            f"task.verifier={spec!r} is neither math, code, exact, similarity nor a function; {_FORM}"
        )
    if where.endswith(".py"):
        if not Path(where).is_file():
            raise UserError(
                f"task.verifier={spec}: there is no file {Path(where).absolute()}; give a path "
                "relative to the working directory, or an absolute one"
            )
        return
    try:
        found = importlib.util.find_spec(where)
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise UserError(
            f"task.verifier={spec}: Python finds no module {where}; install it, start from the "
            "folder that holds it, or name its file: folder/my_rewards.py:score"
        )


def limit_allocations(gib: float) -> None:
    """Bound what this process may allocate, for good: heap and private memory, not mapped files, so that
    libraries that only reserve addresses load. For verifier processes."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = int(gib * 2**30)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def load_custom(spec: str) -> Callable[[str, str, Mapping[str, Any]], Reward]:
    """The user's function as a verifier of (prompt, completion, row with `answer`).

    Raises: UserError if there is no such function or it does not take the four arguments, and
    whatever its module raises when it is imported.
    """
    where, _, name = spec.rpartition(":")
    module = (
        _module_of_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    )
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"task.verifier={spec}: {where} has no function {name}")
    try:
        inspect.signature(function).bind(prompt="", completion="", answer="", row={})
    except TypeError as error:
        raise UserError(
            f"task.verifier={spec} cannot be called ({error}); "
            f"write def {name}(prompt, completion, answer, row)"
        ) from error

    def score(prompt: str, completion: str, row: Mapping[str, Any]) -> Reward:
        value = function(
            prompt=prompt, completion=completion, answer=row.get("answer"), row=dict(row)
        )
        return _reward(value, spec)

    return score


def _module_of_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses and pickle look their module up
    spec.loader.exec_module(module)
    return module


def _reward(value: object, spec: str) -> Reward:
    if not isinstance(value, Mapping):
        total = _finite(value, spec)
        return Reward(total=total, parts={"score": total}, correct=total >= 1)
    if not value:
        raise ValueError(f"{spec} returned an empty mapping; name at least one part")
    if wrong := [name for name in value if not _PART.fullmatch(str(name))]:
        raise ValueError(
            f"{spec} named a part {wrong[0]!r}, which cannot name a curve; use letters, digits and _ . @ -"
        )
    parts = {str(name): _finite(part, f"{spec}, part {name!r},") for name, part in value.items()}
    total = parts.pop("reward") if "reward" in parts else sum(parts.values())
    return Reward(total=total, parts=parts, correct=parts.get("correct", total) >= 1)


def _finite(value: Any, what: str) -> float:
    if getattr(value, "ndim", None) == 0:
        value = value.item()  # a scalar of numpy, torch or jax
    if not isinstance(value, Real):
        raise TypeError(
            f"{what} returned {value!r} of type {type(value).__name__}; "
            "return a number or a mapping of names to numbers"
        )
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{what} returned {number}, which is not finite")
    return number
