"""What is common to all commands."""

import os
import sys
from collections.abc import Callable
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest

from fnet_search.base import shipped
from fnet_search.cli.main import main


def test_without_arguments_the_help_is_shown(fnet: Callable) -> None:
    assert fnet() == fnet("--help")
    code, out, err = fnet()
    assert (code, err) == (0, "")
    assert "fnet-search run --budget 120MMAC" in out


def test_a_terminal_without_the_letters_of_a_path(
    fnet: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In tables, lines and errors, and where the name of a file is no text at all."""
    space = (shipped.folder("spaces") / "tiny.toml").read_text().replace("conv_8", "conv_é")
    for name in ("netz-ñ.toml", os.fsdecode(b"netz-\xff.toml")):
        (tmp_path / name).write_text(space)
        out, err = (TextIOWrapper(BytesIO(), encoding="ascii", errors="strict") for _ in range(2))
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", out)
            patched.setattr(sys, "stderr", err)
            for command, expected in ((("show", name), 0), (("report", name), 2)):
                patched.setattr(sys, "argv", ["fnet-search", *command])
                with pytest.raises(SystemExit) as end:
                    main()
                assert (end.value.code or 0) == expected
        table, line = (stream.detach().getvalue() for stream in (out, err))  # type: ignore[attr-defined]
        assert b"conv_\\xe9 " in table
        assert line.startswith(b"fnet-search: ")
        assert b"netz-" in line
    code, out_text, _ = fnet("show", "netz-ñ.toml")
    assert code == 0
    assert "conv_é " in out_text
