"""Files and directories appear whole or not at all."""

from pathlib import Path

import pytest

from weft.base.durable import write_directory, write_file


def test_write_file_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_file(path, b"one")
    write_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


def test_failed_write_file_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_file(path, b"one")

    def full(handle: int) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_file(path, b"two")
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def test_failed_write_directory_leaves_the_older_one(tmp_path: Path) -> None:
    path = tmp_path / "step-1"
    write_directory(path, lambda partial: (partial / "a").touch())

    def half(partial: Path) -> None:
        (partial / "c").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_directory(path, half)
    assert [file.name for file in path.iterdir()] == ["a"]
    assert list(tmp_path.iterdir()) == [path]

    write_directory(path, lambda partial: (partial / "b").touch())
    assert [file.name for file in path.iterdir()] == ["b"]
