"""What a fork must not cut in two, and what is still to be done when a process ends.

A process that is forked has a copy of all memory and of one thread only. A lock that another thread held at that
moment is held there for ever, by nobody; so is a module that another thread was importing.
"""

import atexit
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

_at_end: "list[Callable[[], object]]" = []
_importing: Final = threading.RLock()
_owners: "dict[weakref.ref[object], str]" = {}


@contextmanager
def importing() -> Iterator[None]:
    """Keep forks waiting while a thread of turntrace's own imports a library, in a block."""
    with _importing:
        yield


def lock_of(owner: object, name: str = "_lock") -> threading.Lock:
    """Return a new lock for an owner's attribute; a process that is forked gets another one there.

    It is for changes that are over in no time, and that the child need not know: what it guards may be half changed.

    Args:
        owner: An object, or a module.
        name: The attribute, which the caller sets to the lock.
    """
    _owners[weakref.ref(owner, lambda gone: _owners.pop(gone, None))] = name
    return threading.Lock()


def _begin_anew() -> None:
    for owner, name in list(_owners.items()):
        found = owner()
        if found is not None:
            setattr(found, name, threading.Lock())
    _importing.release()


def at_exit(call: Callable[[], object]) -> None:
    """Have something called when the process ends, the latest first.

    A child of multiprocessing's that was forked leaves by ``os._exit``, which passes `atexit` over; what ends there is
    told to multiprocessing instead.

    Args:
        call: What to call. It is kept, so it must hold what it works on weakly.
    """
    atexit.register(call)
    _at_end.append(call)


def _end() -> None:
    for call in reversed(_at_end):
        call()


def _tell_multiprocessing(_: object) -> None:
    sys.modules["multiprocessing.util"].Finalize(None, _end, exitpriority=0)


def _in_child() -> None:
    util = sys.modules.get("multiprocessing.util")
    if util is not None:  # it forgets what the parent wanted at its end, and then asks who wants something in the child
        util.register_after_fork(_tell_multiprocessing, _tell_multiprocessing)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
    os.register_at_fork(before=_importing.acquire, after_in_parent=_importing.release, after_in_child=_begin_anew)
