"""Archives and folders from outside: what is let in, and that anything else ends in a DataError."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from dir_toolkit.errors import DataError
from dir_toolkit.experiment.data.archives import FolderFiles, TarFiles, stays_inside

CONTENTS = {"faces/a.jpg": b"first", "faces/b.jpg": b"x" * 1500, "faces/c.jpg": b""}


def tar_bytes(
    contents: dict[str, bytes] = CONTENTS,
    *,
    tar_format: int = tarfile.PAX_FORMAT,
    members: Iterable[tarfile.TarInfo] = (),
) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tar_format) as tar:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for member in members:
            tar.addfile(member)
    return out.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, linkname: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, linkname
    return info


def write(folder: Path, data: bytes, name: str = "faces.tar") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def with_header(field: slice, value: bytes, *, place: int = 0) -> bytes:
    """A valid archive with one header field overwritten and its check sum made to fit."""
    data = bytearray(tar_bytes())
    data[place + field.start : place + field.stop] = value
    data[place + 148 : place + 156] = b" " * 8
    data[place + 148 : place + 156] = b"%06o\0 " % sum(data[place : place + 512])
    return bytes(data)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_it_reads_what_tarfile_writes(tmp_path: Path, pack: Callable[[bytes], bytes], tar_format: int) -> None:
    long = "/".join(["a" * 60, "b" * 60, "é.jpg"])
    contents = {**CONTENTS, long: b"long"}
    files = TarFiles(write(tmp_path, pack(tar_bytes(contents, tar_format=tar_format))))
    assert files.names == list(contents)
    assert dict(files.read(files.names)) == contents
    assert dict(files.read(["faces/b.jpg", long])) == {"faces/b.jpg": contents["faces/b.jpg"], long: b"long"}


def test_folders_and_leading_dots_are_let_in(tmp_path: Path) -> None:
    folders = [member("./", tarfile.DIRTYPE), member("faces/", tarfile.DIRTYPE)]
    data = tar_bytes({"./faces/a.jpg": b"1"}, members=folders)
    assert TarFiles(write(tmp_path, data)).names == ["faces/a.jpg"]


def test_the_digest_is_of_the_stored_bytes(tmp_path: Path) -> None:
    one, two = write(tmp_path, tar_bytes(), "1.tar"), write(tmp_path, tar_bytes({"a": b"2"}), "2.tar")
    assert TarFiles(one).digest() == TarFiles(one).digest() != TarFiles(two).digest()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (member("../evil.jpg"), "'../evil.jpg' must have a name inside"),
        (member("faces/../../evil.jpg"), "must have a name inside"),
        (member("/etc/evil.jpg"), "must have a name inside"),
        (member("C:/evil.jpg"), "must have a name inside"),
        (member("faces\\..\\evil.jpg"), "must have a name inside"),
        (member("faces/link", tarfile.SYMTYPE, "/etc/passwd"), "'faces/link' must be a regular file .* symbolic link"),
        (member("faces/link", tarfile.LNKTYPE, "faces/a.jpg"), "got a hard link"),
        (member("faces/dev", tarfile.CHRTYPE), "got a device"),
        (member("faces/pipe", tarfile.FIFOTYPE), "got a pipe"),
        (member("faces/sparse", tarfile.GNUTYPE_SPARSE), "got b'S'"),
        (member("faces/a.jpg"), "must stand in the archive once"),
        (member("./faces//a.jpg"), "must stand in the archive once"),
        (member("faces/a.jpg", tarfile.DIRTYPE), "must stand in the archive once"),
    ],
)
def test_one_bad_member_refuses_the_archive(tmp_path: Path, bad: tarfile.TarInfo, message: str) -> None:
    path = write(tmp_path, tar_bytes(members=[bad]))
    with pytest.raises(DataError, match=message) as caught:
        TarFiles(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"most_files": 2}, "'faces/c.jpg' must be among the first 2"),
        ({"most_bytes": 1000}, "'faces/b.jpg' must end within the first 1,000 bytes"),
        ({"most_bytes_each": 1499}, "'faces/b.jpg' must hold at most 1,499 bytes, got 1,500"),
    ],
)
def test_archives_over_a_limit_are_refused(tmp_path: Path, limits: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        TarFiles(write(tmp_path, tar_bytes()), **limits)


def test_a_promised_size_is_not_believed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must end within"):
        TarFiles(write(tmp_path, with_header(slice(124, 136), b"777777777777")))
    with pytest.raises(DataError, match="must hold at most"):
        TarFiles(write(tmp_path, with_header(slice(124, 136), b"07777777777\0")))
    with pytest.raises(DataError, match="byte 0 must be whole"):
        TarFiles(write(tmp_path, with_header(slice(124, 136), b"\xff" * 12)))
    for kind in (b"L", b"x", b"g"):
        bad = bytearray(with_header(slice(124, 136), b"00100000000\0"))
        bad[156:157] = kind
        bad[148:156] = b" " * 8
        bad[148:156] = b"%06o\0 " % sum(bad[:512])
        with pytest.raises(DataError, match="bytes of names"):
            TarFiles(write(tmp_path, bytes(bad)))


@pytest.mark.parametrize("key", ["size", "GNU.sparse.major"])
def test_pax_records_that_change_contents_are_refused(tmp_path: Path, key: str) -> None:
    info = member("a.jpg")
    info.pax_headers = {key: "1"}
    with pytest.raises(DataError, match=f"pax record '{key}'"):
        TarFiles(write(tmp_path, tar_bytes({}, members=[info])))


@pytest.mark.parametrize("records", [b"99 path=a\n", b"x path=a\n", b"9 path=ab", b"0 path=a\n", b"\xff\xfe"])
def test_broken_pax_records_are_refused(tmp_path: Path, records: bytes) -> None:
    header = member("pax", b"x")
    header.size = len(records)
    data = header.tobuf() + records.ljust(512, b"\0") + tar_bytes()
    with pytest.raises(DataError, match="pax records at byte 0 must be whole"):
        TarFiles(write(tmp_path, data))


def test_one_name_for_all_members_is_refused(tmp_path: Path) -> None:
    record = b"10 path=a\n"
    header = member("pax", b"g")
    header.size = len(record)
    with pytest.raises(DataError, match="a header of its own"):
        TarFiles(write(tmp_path, header.tobuf() + record.ljust(512, b"\0") + tar_bytes()))


def test_a_damaged_header_in_the_middle_does_not_end_the_list(tmp_path: Path) -> None:
    data = bytearray(tar_bytes(tar_format=tarfile.USTAR_FORMAT))
    data[1024 + 3] ^= 1  # in the second member's name: tarfile would list one member and say nothing
    with pytest.raises(DataError, match="header at byte 1,024 must be whole"):
        TarFiles(write(tmp_path, bytes(data)))


@pytest.mark.parametrize("cut", [0, 100, 512, 600, 1024, 3 * 512])
def test_an_archive_that_is_cut_short_is_refused(tmp_path: Path, cut: int) -> None:
    with pytest.raises(DataError, match="whole and readable"):
        TarFiles(write(tmp_path, tar_bytes(tar_format=tarfile.USTAR_FORMAT)[:cut]))


def test_a_damaged_gzip_stream_is_refused(tmp_path: Path) -> None:
    packed = gzip.compress(tar_bytes())
    flipped = bytearray(packed)
    flipped[-6] ^= 1  # the check sum behind the last byte
    for bad in (packed[: len(packed) // 2], packed[:-4], bytes(flipped), packed + b"more"):
        with pytest.raises(DataError, match="whole and readable"):
            TarFiles(write(tmp_path, bad))


def test_nothing_hides_behind_the_end(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing but zeros"):
        TarFiles(write(tmp_path, tar_bytes() + tar_bytes({"late": b"1"})))
    with pytest.raises(DataError, match="nothing but zeros"):
        TarFiles(write(tmp_path, gzip.compress(tar_bytes() + bytes(2**25))))


def test_a_missing_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="FileNotFoundError"):
        TarFiles(tmp_path / "none.tar")


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_mutated_archives_give_our_error_or_a_valid_list(
    tmp_path: Path, mutations: Callable[..., Iterator[bytes]], pack: Callable[[bytes], bytes], tar_format: int
) -> None:
    valid = pack(tar_bytes({**CONTENTS, "d" * 150 + "/é.jpg": b"long"}, tar_format=tar_format))
    refused = 0
    for changed in mutations(valid, count=300):
        try:
            files = TarFiles(write(tmp_path, changed))
            for name, data in files.read(files.names):
                assert stays_inside(name)
                assert len(data) <= len(changed) or pack is gzip.compress
        except DataError:
            refused += 1
    assert refused > 100


def test_a_folder_reads_its_files_and_digests_them(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub", b"one", "a.jpg")
    files = FolderFiles(tmp_path)
    assert files.has("sub/a.jpg", source="list")
    assert not files.has("sub/none.jpg", source="list")
    assert dict(files.read(["sub/a.jpg"])) == {"sub/a.jpg": b"one"}
    before = files.digest(["sub/a.jpg"])
    write(tmp_path / "sub", b"two", "a.jpg")
    assert files.digest(["sub/a.jpg"]) != before
    with pytest.raises(DataError, match=r"none\.jpg: the file must be readable"):
        list(files.read(["none.jpg"]))
    with pytest.raises(DataError, match="root must be a folder"):
        FolderFiles(tmp_path / "none")


def test_a_folder_reads_nothing_outside_itself(tmp_path: Path) -> None:
    root = tmp_path / "out"
    (root / "in").mkdir(parents=True)
    (tmp_path / "out-evil").mkdir()
    write(tmp_path / "out-evil", b"secret", "a.jpg")
    write(root / "in", b"fine", "a.jpg")
    (root / "link.jpg").symlink_to(tmp_path / "out-evil" / "a.jpg")
    (root / "folder").symlink_to(tmp_path / "out-evil")
    (root / "inner.jpg").symlink_to(root / "in" / "a.jpg")
    (root / "loop.jpg").symlink_to(root / "loop.jpg")
    os.mkfifo(root / "pipe.jpg")
    files = FolderFiles(root)
    assert files.has("inner.jpg", source="list")
    outside = ["link.jpg", "folder/a.jpg", "../out-evil/a.jpg", "in/../../out-evil/a.jpg", "", "."]
    for name in [*outside, str(root / "in" / "a.jpg"), "a\0b", "in\\a.jpg"]:
        with pytest.raises(DataError, match="list, line 3: path must stay inside"):
            files.has(name, source="list, line 3")
    for name in ["pipe.jpg", "in"]:
        with pytest.raises(DataError, match="regular file"):
            files.has(name, source="list")
    for name in ["loop.jpg", "in/a.jpg/b.jpg", "n" * 5000]:
        with pytest.raises(DataError, match=r"list: path must"):
            files.has(name, source="list")


def test_a_folder_refuses_giant_files(tmp_path: Path) -> None:
    with write(tmp_path, b"", "giant.jpg").open("wb") as file:
        file.truncate(2**25 + 1)
    with pytest.raises(DataError, match="at most 33,554,432 bytes"):
        FolderFiles(tmp_path).has("giant.jpg", source="list")
