"""How worker processes are started. No torch: the server that they are forked from may start while it is imported."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, get_all_start_methods, get_context, resource_tracker
from multiprocessing.context import ForkServerContext, SpawnContext


def process_context() -> ForkServerContext | SpawnContext:
    """How processes are started: forked from a server that has imported torch once, where the system has that.

    The server never runs a thread or touches a device, so that forking it is safe.
    """
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["fnet_search.candidates.workers"])
    return context


def start_server(threads: int) -> None:
    """Starts the server that workers are forked from, if there is none, and returns at once: it imports torch while
    this process does other things. `threads` are those of a worker."""
    if isinstance(process_context(), ForkServerContext):
        with starting(threads):
            forkserver.ensure_running()


@contextmanager
def starting(threads: int) -> Iterator[None]:
    """A worker, or the server, may be started within."""
    with environment(threads), _uninterrupted(), _without_main():
        yield


@contextmanager
def environment(threads: int) -> Iterator[None]:
    """What a worker must find in its environment from the start.

    OpenMP reads its threads when torch is imported. glibc gives every large tensor fresh pages and takes them back,
    which costs a training a quarter of its time in page faults; a heap that is kept, in huge pages, avoids that.
    """
    wanted = {
        "OMP_NUM_THREADS": str(threads),
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _without_main() -> Iterator[None]:
    """Workers need nothing of the script that called; multiprocessing would run it again in each of them."""
    main = vars(sys.modules["__main__"])
    hidden = {name: main.pop(name) for name in ("__file__", "__spec__") if name in main}
    main["__spec__"] = None
    try:
        yield
    finally:
        main.update({"__spec__": None} | hidden)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C goes to all processes of a terminal, but one that is started here never sees it: the host ends it."""
    resource_tracker.ensure_running()  # its start, else part of that of the first process, would let Ctrl-C in again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
