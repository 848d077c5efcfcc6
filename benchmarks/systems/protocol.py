"""How `benchmarks.peers` speaks with a worker: commands as lines on stdin, JSON lines on stdout.

    worker                         peers
    {"ready": ..., versions} --->
                         <-------  rollout | tail | train | peak | greedy
    {"seconds": ..., ...}  ----->
A worker acts only between a command and its answer, so that workers never disturb each other.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.workload import Workload

Answer = dict[str, Any]
GREEDY_PROMPTS, GREEDY_TOKENS = 4, 8
"""Greedy completions that every system must agree on: the proof that they compute the same model."""


class Conversation:
    """The worker's end. Keeps stdout for itself; whatever libraries print goes to stderr."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self.workload = Workload.load(Path(sys.argv[1]))

    def ready(self, versions: Mapping[str, str], **more: Any) -> None:
        """Say that everything is loaded."""
        self.reply({"ready": True, "versions": dict(versions), **more})

    def next(self) -> str | None:
        """The next command; None: there will be no more."""
        line = sys.stdin.readline()
        return line.strip() or None

    def reply(self, answer: Answer) -> None:
        """Answer the last command."""
        self._out.write(json.dumps(answer) + "\n")
        self._out.flush()

    def serve(self, handlers: Mapping[str, Callable[[], Answer]]) -> None:
        """Answer commands until there are no more."""
        while (command := self.next()) is not None:
            self.reply(handlers[command]())
