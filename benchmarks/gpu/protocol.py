"""How the suite speaks with a process that runs cases: one job in, one JSON object per line out. Loads no jax.

In: one line of JSON, the job. Out: {"ready": what it runs on}, then {"begun": name} and {"ended": name,
"result": ...} of every case. Standard input stays open as long as the suite lives.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

Answer = Callable[[dict[str, Any]], None]
ERROR_CHARACTERS = 300


def connect() -> tuple[dict[str, Any], Answer]:
    """(the job, how to answer). From here on everything else that this process prints goes to standard error,
    and it ends with the suite: after a kill none of its processes is left to hold the device."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_suite, daemon=True).start()
    return job, answer


def _end_with_the_suite() -> None:
    while os.read(0, 1):  # waits; empty once nobody holds the other end
        pass
    os._exit(1)


def told(name: str, run: Callable[[], dict[str, Any]], answer: Answer) -> bool:
    """Run one case between its `begun` and its `ended`; whether it is done. If not, the process shall end: an
    error on a device, or memory that the case left behind, would be the next one's too."""
    answer({"begun": name})
    began = time.perf_counter()
    try:
        result = run()
    except Exception as error:  # reported and stored as the outcome of this case
        traceback.print_exc()
        why = f"{type(error).__name__}: {error}"
        result = {"status": "failed", "why": why[:ERROR_CHARACTERS]}
    answer({"ended": name, "result": {**result, "wall_s": time.perf_counter() - began}})
    return result["status"] == "done"
