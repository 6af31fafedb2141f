"""What a fork must not cut in two, what a child makes anew, and what is still to be done when a process ends.

A process that is forked has a copy of all memory and of one thread only. A lock that another thread held at that
moment is held there for ever, by nobody; so is a module that another thread was importing.
"""

import atexit
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Final, NoReturn

logger = logging.getLogger("turntrace")

_exit: Final = os._exit
_at_end: "list[Callable[[], object]]" = []
_importing: Final = threading.RLock()
_owners: "dict[weakref.ref[object], str]" = {}
_is_new = False
_anew: "list[weakref.WeakMethod[Callable[[], object]]]" = []


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


def in_child(method: Callable[[], object]) -> None:
    """Have a method of an object called in a process that is forked, for as long as the object lives.

    It makes anew what is the parent's: threads, and the locks and events that they wait for. Where gevent patches the
    child afterwards, as gunicorn's workers do, it is called again: one of those that were made before keeps all of the
    process waiting, not only who waits for it.

    Args:
        method: The method. Those of objects that were made later are called later.
    """
    _anew.append(weakref.WeakMethod(method, _anew.remove))


def _begin_anew() -> None:
    for owner, name in list(_owners.items()):
        found = owner()
        if found is not None:
            setattr(found, name, threading.Lock())
    for weak in _anew:
        method = weak()
        if method is None:
            continue
        try:
            method()
        except Exception:  # the others are to begin all the same
            logger.exception("turntrace: something could not begin anew in a process that was forked")


def at_exit(call: Callable[[], object]) -> None:
    """Have something called when the process ends, the latest first.

    A child of multiprocessing's, of Celery's or of RQ's that was forked leaves by ``os._exit``, which passes `atexit`
    over: there it is called before.

    Args:
        call: What to call. It is kept, so it must hold what it works on weakly.
    """
    atexit.register(call)
    _at_end.append(call)
    _see_how_it_ends()


def _end() -> None:
    for call in reversed(_at_end):
        call()


def _see_how_it_ends() -> None:
    """Be told of the end by those who pass `atexit` over, as far as they are there."""
    signals = sys.modules.get("celery.signals")
    if signals is not None:
        signals.worker_process_shutdown.connect(_end_of_celerys, weak=False)
    if "rq.worker" in sys.modules and os._exit is not _end_of_rqs:  # it has nothing that is told
        os._exit = _end_of_rqs
    process = sys.modules.get("multiprocessing.process")
    if process is not None and process.parent_process() is not None:
        _tell_multiprocessing(None)


def _tell_multiprocessing(_: object) -> None:
    sys.modules["multiprocessing.util"].Finalize(None, _end, exitpriority=0)


def _end_of_celerys(**_: object) -> None:
    _end()


def _end_of_rqs(status: int) -> NoReturn:
    try:
        if "RQ_JOB_ID" in os.environ:
            _end()
    finally:
        _exit(status)


def _on_patch(event: object) -> None:
    global _is_new
    events: Any = sys.modules["gevent.events"]
    if _is_new and isinstance(event, events.GeventDidPatchAllEvent):
        _is_new = False
        _begin_anew()


def _in_child() -> None:
    global _is_new
    _importing.release()
    _begin_anew()
    util = sys.modules.get("multiprocessing.util")
    if util is not None:  # it forgets what the parent wanted at its end, and then asks who wants something in the child
        util.register_after_fork(_tell_multiprocessing, _tell_multiprocessing)
    _see_how_it_ends()
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None and not monkey.is_module_patched("threading"):
        _is_new = True
        subscribers = import_module("gevent.events").subscribers
        if _on_patch not in subscribers:
            subscribers.append(_on_patch)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_importing.acquire, after_in_parent=_importing.release, after_in_child=_in_child)
