from __future__ import annotations

import os
import stat
import threading
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from dir_toolkit._files import write_atomically
from dir_toolkit.experiment.files import FolderLock


def test_writes_a_new_file_and_replaces_an_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    for content in (b"one", b"a longer two", b""):
        write_atomically(path, lambda file, content=content: file.write(content))
        assert path.read_bytes() == content
        assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_writer_that_raises_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, failure: type[BaseException]
) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def writer(file: BinaryIO) -> None:
        file.write(b"half of the new")
        raise failure("stopped")

    with pytest.raises(failure, match="stopped"):
        write_atomically(path, writer)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_no_reader_ever_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    contents = {bytes([i]) * 200_000 for i in range(2)}
    write_atomically(path, lambda file: file.write(min(contents)))
    done, seen = threading.Event(), []

    def read() -> None:
        while not done.is_set():
            seen.append(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()

    def in_pieces(file: BinaryIO, content: bytes) -> None:
        for start in range(0, len(content), 10_000):
            file.write(content[start : start + 10_000])
            file.flush()

    for i in range(20):
        write_atomically(path, lambda file, i=i: in_pieces(file, sorted(contents)[i % 2]))
    done.set()
    reader.join()
    assert seen
    assert set(seen) <= contents


def test_a_link_is_followed(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    write_atomically(link, lambda file: file.write(b"new"))
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


def test_a_file_gets_the_mode_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_atomically(tmp_path / "ours", lambda file: file.write(b""))
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_content_and_folder_reach_the_disk_before_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(stat.S_ISDIR(os.fstat(fd).st_mode)), real(fd)))
    write_atomically(tmp_path / "a", lambda file: file.write(b"x"))
    assert synced == [False, True]


def test_refuses_a_missing_folder_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"path must lie in an existing folder, got '.*gone"):
        write_atomically(tmp_path / "gone" / "a", lambda file: None)
    with pytest.raises(IsADirectoryError, match="path must be a file, got the folder"):
        write_atomically(tmp_path, lambda file: None)


def test_a_folder_is_locked_until_it_is_released_and_left_as_it_was(tmp_path: Path) -> None:
    first = FolderLock(tmp_path)
    assert first.held
    assert not FolderLock(tmp_path).held
    first.release()
    first.release()
    assert not first.held
    assert FolderLock(tmp_path).held
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        FolderLock(tmp_path / "gone")


def test_a_name_as_long_as_a_file_may_have(tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 127)
    write_atomically(path, lambda file: file.write(b"whole"))
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_can_be_written_and_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refuse(path: Any, *arguments: Any, **options: Any) -> int:
        if Path(path) == tmp_path:
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    write_atomically(tmp_path / "a", lambda file: file.write(b"whole"))
    assert (tmp_path / "a").read_bytes() == b"whole"
    assert FolderLock(tmp_path).held
