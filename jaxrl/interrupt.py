"""Ctrl-C or SIGTERM while a run trains: the first ends it after the step under way, the second at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_STDERR = 2
_ANSWER = b"\nStopping after this step, with a checkpoint and the summary. Again: at once.\n"


@contextmanager
def stop_asked() -> Iterator[threading.Event]:
    """Inside it the first signal sets the event, and the second raises KeyboardInterrupt.

    Outside the main thread, which alone receives signals, the event is never set.
    """
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        os.write(_STDERR, _ANSWER)  # print might be under way in the code that was interrupted

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, ask) for number in _SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
