"""Calls from the checker into the program: values cross as JSON, objects as handles.

The program can answer whatever it likes, but only with plain data of Python's own types, rebuilt on the
checker's side: an object that claims to equal everything arrives as a handle that equals nothing else.
Arguments are copies: a test that watches its own argument being changed in place is not supported.
"""

from __future__ import annotations

import builtins
import json
from collections import deque
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import IO, Any

_COLLECTIONS = {
    kind.__name__: kind for kind in (tuple, set, frozenset, deque)
}  # fmt: skip
_AS_TEXT = {kind.__name__: kind for kind in (Fraction, Decimal)}


class ProgramError(Exception):
    """The program raised something that is no built-in exception, or it is gone."""


def encode(value: object, handle: Callable[[object], int]) -> object:
    """JSON of a value: plain data by content, subclasses as their built-in base, others by handle.

    Iterators are exhausted. Raises: what `handle` raises for an object that may not cross.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, dict):
        pairs = [[encode(k, handle), encode(v, handle)] for k, v in dict.items(value)]
        return {"dict": pairs}
    if isinstance(value, list):
        return [encode(item, handle) for item in value]
    for name, kind in _COLLECTIONS.items():
        if isinstance(value, kind):
            return {name: [encode(item, handle) for item in value]}
    for name, kind in _AS_TEXT.items():
        if isinstance(value, kind):
            return {name: str(value)}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, Iterator):
        return {"iterator": [encode(item, handle) for item in value]}
    return {"handle": handle(value)}


def decode(data: Any, held: Callable[[int], object]) -> Any:
    """The value behind JSON of `encode`. Raises: ValueError, TypeError or the like for any other."""
    if isinstance(data, list):
        return [decode(item, held) for item in data]
    if not isinstance(data, dict):
        return data
    ((name, content),) = data.items()
    if name == "dict":
        return {decode(k, held): decode(v, held) for k, v in content}
    if name in _COLLECTIONS:
        return _COLLECTIONS[name](decode(item, held) for item in content)
    if name in _AS_TEXT:
        return _AS_TEXT[name](content)
    if name == "bytes":
        return bytes.fromhex(content)
    if name == "complex":
        return complex(*content)
    if name == "range":
        return range(*content)
    if name == "iterator":
        return iter([decode(item, held) for item in content])
    return held(content)


def serve(names: dict[str, object], requests: IO[str], answers: IO[str]) -> None:
    """The program's side: answer requests until the checker is gone."""
    held: list[object] = []

    def hold(value: object) -> int:
        held.append(value)
        return len(held) - 1

    for line in requests:
        try:
            answer = {"value": encode(_evaluate(json.loads(line), names, held), hold)}
            text = json.dumps(answer)
        except Exception as error:
            text = json.dumps({"error": type(error).__name__, "text": str(error)[:500]})
        answers.write(text + "\n")
        answers.flush()


def _evaluate(request: dict[str, Any], names: dict[str, object], held: list[Any]) -> object:
    if "name" in request:
        return names[request["name"]]
    if "attribute" in request:
        return getattr(held[request["of"]], request["attribute"])
    positional, named = decode(request["arguments"], held.__getitem__)
    return held[request["of"]](*positional, **named)


class Calls:
    """The checker's side: one request at a time."""

    def __init__(self, requests: IO[str], answers: IO[str]) -> None:
        self._requests, self._answers = requests, answers
        self.gone = False
        """Whether the program has ended or broken the protocol: no later check may pass."""

    def ask(self, request: dict[str, object]) -> Any:
        """The program's answer. Raises: the built-in exception that it raised, else ProgramError."""
        try:
            self._requests.write(json.dumps(request) + "\n")
            self._requests.flush()
            answer = json.loads(self._answers.readline())
            if "error" not in answer:
                return decode(answer["value"], lambda number: Handle(self, number))
            name, text = str(answer["error"]), str(answer["text"])
        except Exception as error:
            self.gone = True
            raise ProgramError(f"no answer from the program: {error!r}") from error
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            raise kind(text)
        raise ProgramError(f"{name}: {text}")

    def call(self, number: int, positional: tuple, named: dict[str, object]) -> Any:
        """Call the object with this handle. Raises: TypeError for an argument that cannot cross."""
        arguments = encode([positional, named], _handle_of)
        return self.ask({"of": number, "arguments": arguments})


class Handle:
    """An object of the program: it can be called, and its attributes read."""

    def __init__(self, calls: Calls, number: int) -> None:
        self._calls, self._number = calls, number

    def __call__(self, *positional: object, **named: object) -> Any:
        """Call the object; arguments are copied."""
        return self._calls.call(self._number, positional, named)

    def __getattr__(self, name: str) -> Any:
        """An attribute of the object."""
        return self._calls.ask({"of": self._number, "attribute": name})


def _handle_of(value: object) -> int:
    if isinstance(value, Handle):
        return vars(value)["_number"]
    raise TypeError(f"a {type(value).__name__} cannot be passed to the program")
