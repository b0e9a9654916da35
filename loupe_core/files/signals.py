"""Ctrl-C, and a cluster's SIGTERM, while something is being written."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stopped(KeyboardInterrupt):
    """A training was asked to stop, by Ctrl-C or by a cluster's SIGTERM; `signal` is its number."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


@contextmanager
def on_signals(handler: Callable) -> Iterator[None]:
    """Ctrl-C and SIGTERM call `handler(number, frame)` in this block. Python gives signals to the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)
