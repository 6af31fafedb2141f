"""The tracker of this process, for handlers that are given none."""

import threading

from turntrace.lifecycle.tracker import SessionTracker

_default: list[SessionTracker] = []
_default_lock = threading.Lock()


def default_tracker() -> SessionTracker:
    """Return the tracker of this process, with settings from the environment; the first time it is made."""
    with _default_lock:
        if not _default:
            _default.append(SessionTracker())
        return _default[0]
