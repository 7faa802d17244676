"""Starts worker processes. Imports no torch, so that the fork server can start while this process imports it."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, get_all_start_methods, get_context, resource_tracker
from multiprocessing.context import ForkServerContext, SpawnContext


def process_context() -> ForkServerContext | SpawnContext:
    """The start method of workers: forked from a server that has imported torch once, or spawned where the system has
    no fork server.

    The server starts no thread and uses no device, so forking it is safe.
    """
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["fnet_search.candidates.fork_server"])
    return context


def start_server(threads: int) -> None:
    """Starts the fork server, if it does not run, and returns at once: it imports torch while this process goes on.
    `threads` are those of a worker."""
    if isinstance(process_context(), ForkServerContext):
        with starting(threads):
            forkserver.ensure_running()


@contextmanager
def starting(threads: int) -> Iterator[None]:
    """A context in which a worker or the fork server may be started."""
    with environment(threads), _uninterrupted(), _without_main():
        yield


@contextmanager
def environment(threads: int) -> Iterator[None]:
    """Sets the environment variables that a worker needs from its start.

    OpenMP reads its number of threads when torch is imported. By default glibc maps fresh pages for every large tensor
    and unmaps them again, which costs a training a quarter of its time in page faults; a heap that keeps its memory, in
    huge pages, avoids that.
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
    """Hides the caller's script, which multiprocessing would otherwise run again in each worker."""
    main = vars(sys.modules["__main__"])
    hidden = {name: main.pop(name) for name in ("__file__", "__spec__") if name in main}
    main["__spec__"] = None
    try:
        yield
    finally:
        main.update({"__spec__": None} | hidden)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Lets the started process ignore Ctrl-C, which a terminal sends to all its processes: the host ends workers
    itself."""
    resource_tracker.ensure_running()  # if started along with the first process, it would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
