import json
import os
from pathlib import Path

import pytest
import torch

from fnet_search.base.errors import FnetError
from fnet_search.base.files import read_json, replacing, write_json, write_text
from fnet_search.training.weights import write_tensors


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.txt"
    with replacing(path) as temporary:
        temporary.write_text("whole", encoding="utf-8")
        assert temporary.parent == path.parent
        assert not path.exists()
    assert path.read_text(encoding="utf-8") == "whole"
    assert names(path.parent) == ["file.txt"]


@pytest.mark.parametrize("interruption", [ValueError, KeyboardInterrupt])
def test_what_was_there_stays_when_the_block_fails(tmp_path: Path, interruption: type[BaseException]) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half", encoding="utf-8")
            raise interruption

    with pytest.raises(interruption):
        fail()
    assert path.read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == ["file.txt"]


def test_nothing_is_left_where_nothing_was_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "file.txt"):
        pass
    assert names(tmp_path) == []


def test_text_and_json_come_back(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "à la\ncarte")
    assert (tmp_path / "a.txt").read_bytes() == "à la\ncarte".encode()
    data = {"name": "Å", "values": [1, 0.1, None, True], "nested": {"x": []}}
    write_json(tmp_path / "a.json", data)
    assert read_json(tmp_path / "a.json") == data
    assert list(read_json(tmp_path / "a.json")) == list(data)
    assert (tmp_path / "a.json").read_bytes().endswith(b"}\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_holds_no_numbers_that_are_not_json(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"value": value})
    assert names(tmp_path) == []


def test_json_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(FnetError, match=r"cannot read .*a\.json"):
        read_json(path)
    whole = json.dumps({"a": [1, 2, 3]}).encode()
    for broken in (b"", whole[:-1], b"\xff\xfe" + whole):
        path.write_bytes(broken)
        with pytest.raises(FnetError, match=r"cannot read .*a\.json"):
            read_json(path)
    path.write_bytes(whole)
    assert read_json(path) == {"a": [1, 2, 3]}


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_files_are_as_readable_as_any_new_file(tmp_path: Path, mask: int) -> None:
    """Also those that replace one, and those that safetensors writes for their owner alone."""
    before = os.umask(mask)
    try:
        (tmp_path / "any").touch()
        wanted = (tmp_path / "any").stat().st_mode
        for _ in range(2):
            write_text(tmp_path / "text", "text")
            write_tensors(tmp_path / "tensors", {"a": torch.zeros(1)}, {})
            write_tensors(tmp_path / "tensors", {"a": torch.zeros(1)}, {})
            assert (tmp_path / "text").stat().st_mode == (tmp_path / "tensors").stat().st_mode == wanted
            (tmp_path / "text").chmod(0o600)
            (tmp_path / "tensors").chmod(0o600)
    finally:
        os.umask(before)
