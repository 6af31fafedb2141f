"""What a fork must not cut in two.

A process that is forked has a copy of all memory and of one thread only. A lock that another thread held at that
moment is held there for ever, by nobody; so is a module that another thread was importing.
"""

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

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


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_importing.acquire, after_in_parent=_importing.release, after_in_child=_begin_anew)
