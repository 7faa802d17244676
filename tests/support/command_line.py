"""The command line as the tests call it."""

import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from io import BytesIO, TextIOWrapper
from pathlib import Path

import optuna
import pytest

from fnet_search.cli.main import main

Files = Mapping[str, bytes]
Result = tuple[int, str, str]
"""Exit code, standard output, standard error."""

TINY = ("--space", "tiny", "--budget", "100%")
PLAIN = ("--workers", "0", "--dtype", "float32", "--no-fused")
"""No process to start and no kernels to compile, which takes seconds; the same bits in all runs."""
SMALL = (*TINY, "--policy", "reverse-pyramid", "--epochs", "1", "--trials", "2", "--no-warm-start", *PLAIN)


def files_in(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def in_process(*arguments: str) -> Result:
    """The command line in this process, which is left as it was."""
    handler, verbosity = signal.getsignal(signal.SIGTERM), optuna.logging.get_verbosity()
    out, err = (TextIOWrapper(BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.MonkeyPatch.context() as patched:
            patched.setattr(sys, "argv", ["fnet-search", *arguments])
            with pytest.raises(SystemExit) as end:
                main()
    finally:
        signal.signal(signal.SIGTERM, handler)
        optuna.logging.set_verbosity(verbosity)
    assert isinstance(end.value.code, int)
    said = [stream.detach().getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
    return end.value.code, said[0], said[1]


def process(*arguments: str, cwd: Path) -> "subprocess.Popen[str]":
    """The command line in a process, and a process group, of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "fnet_search", *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )


def remove(path: Path) -> None:
    if path.is_dir():
        for entry in path.iterdir():
            remove(entry)
        path.rmdir()
    else:
        path.unlink()


def last_line(out: str) -> str:
    return out.splitlines()[-1]
