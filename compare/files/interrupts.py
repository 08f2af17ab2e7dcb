"""Finish a change of several steps before a signal interrupts it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Handle signals, such as that of Ctrl-C, only after the block.

    Python runs signal handlers in the main thread alone; elsewhere there is nothing to delay.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {
        number: handler
        for number in signal.valid_signals()
        if callable(handler := signal.getsignal(number))
    }
    delayed: list[int] = []
    try:
        for number in handlers:
            signal.signal(number, lambda number, _frame: delayed.append(number))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for late in delayed:
            signal.raise_signal(late)
