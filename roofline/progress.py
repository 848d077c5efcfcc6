"""A bar for what takes a few seconds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")


def tracked(items: Sequence[Item], title: str) -> Iterable[Item]:
    """The items one after another, with a bar on stderr where that is a terminal; it is gone at the end."""
    console = Console(stderr=True)
    return track(items, title, console=console, transient=True, disable=not console.is_terminal)
