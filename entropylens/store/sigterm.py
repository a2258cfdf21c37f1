"""A handler of SIGTERM put before the one that is there, and taken away again."""

import signal
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["install", "uninstall"]


def install(handler: Callable[[int, Any], None]) -> Any:
    """Put ``handler`` before the present one; None where that cannot be, or the signal is off."""
    present = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or present is signal.SIG_IGN:
        return None
    if present is None:
        return None
    return signal.signal(signal.SIGTERM, handler)


def uninstall(handler: Callable[[int, Any], None], previous: Any) -> None:
    """Put back what was there, unless somebody has put another since."""
    if threading.current_thread() is not threading.main_thread() or previous is None:
        return
    if signal.getsignal(signal.SIGTERM) == handler:
        signal.signal(signal.SIGTERM, previous)
