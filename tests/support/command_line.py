"""The command line as the tests call it."""

import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

Files = Mapping[str, bytes]
Result = tuple[int, str, str]
"""Exit code, standard output, standard error."""

TINY = ("--space", "tiny", "--budget", "100%")
PLAIN = ("--workers", "1", "--dtype", "float32", "--no-fused")
"""The same bits in all runs, and no kernels to compile, which costs seconds."""
SMALL = (*TINY, "--policy", "reverse-pyramid", "--epochs", "1", "--trials", "2", "--no-warm-start", *PLAIN)


def files_in(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
