"""CSV lists of images: what is read, what each fault is called, and the data cards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dir_toolkit.errors import DataError
from dir_toolkit.experiment.data.dir_lists import dir_list
from dir_toolkit.experiment.data.images import Splits

ROWS = [
    f"{age},AgeDB/{i}.jpg,{split}"
    for i, (age, split) in enumerate([(31, "train"), (8, "test"), (59, "val"), (101, "train"), (0, "test")])
]


@pytest.fixture
def root(tmp_path: Path, jpeg: Callable[..., bytes]) -> Path:
    folder = tmp_path / "root"
    (folder / "AgeDB").mkdir(parents=True)
    for i in range(5):
        (folder / "AgeDB" / f"{i}.jpg").write_bytes(jpeg(i))
    return folder


@pytest.fixture
def read(tmp_path: Path, root: Path) -> Any:
    def read(rows: Any = ROWS, header: str = "age,path,split", end: str = "\n", **settings: Any) -> Any:
        listing = tmp_path / "list.csv"
        data = rows if isinstance(rows, bytes) else (end.join([header, *rows]) + end).encode()
        listing.write_bytes(data)
        return dir_list(listing, root, **{"source": "agedb_dir", "size": 8, "cache": tmp_path / "cache", **settings})

    return read


def assert_as_listed(splits: Splits) -> None:
    assert splits.train.labels.tolist() == [31, 101]
    assert splits.val.labels.tolist() == [59]
    assert splits.test.labels.tolist() == [8, 0]
    assert splits.train.rows.tolist() == [0, 3]
    assert (splits.source, splits.skipped) == ("agedb_dir", {})
    assert splits.train.images.shape == (5, 3, 8, 8)


def test_a_list_gives_its_images_and_ages(read: Callable[..., Splits]) -> None:
    assert_as_listed(read())


def test_byte_order_mark_and_windows_lines(read: Callable[..., Splits]) -> None:
    assert_as_listed(read(header="\ufeffage,path,split", end="\r\n"))


def test_quoted_fields_other_columns_and_empty_lines(read: Callable[..., Splits]) -> None:
    rows = [row.split(",") for row in ROWS]
    assert_as_listed(
        read([f'{split},"a, ""b""\nc","{path}",{age}\n' for age, path, split in rows], "split,note,path,age")
    )


def test_ages_may_have_decimals(read: Callable[..., Splits]) -> None:
    assert read(["31.5" + ROWS[0][2:], *ROWS[1:]]).train.labels.tolist() == [31.5, 101]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("young,AgeDB/4.jpg,test", "age must be a number from 0 to 200, in years, got 'young'"),
        ("nan,AgeDB/4.jpg,test", "age must be"),
        ("inf,AgeDB/4.jpg,test", "age must be"),
        ("-3,AgeDB/4.jpg,test", "age must be"),
        ("201,AgeDB/4.jpg,test", "age must be"),
        ("1_0,AgeDB/4.jpg,test", "age must be"),
        (",AgeDB/4.jpg,test", "age must be"),
        ("30,AgeDB/4.jpg,dev", "split must be train, val or test, got 'dev'"),
        ("30,AgeDB/4.jpg", "a row must have 3 cells, got 2"),
        ("30,AgeDB/4.jpg,test,more", "a row must have 3 cells, got 4"),
        ("30,AgeDB/0.jpg,test", "must stand in one split, got 'AgeDB/0.jpg' in train and test"),
        ("30,../secret.jpg,test", "path must stay inside"),
        ("30,../root-evil/4.jpg,test", "path must stay inside"),
        ("30,/etc/passwd,test", "path must stay inside"),
        ("30,AgeDB/link.jpg,test", "path must stay inside"),
        ("30,out/4.jpg,test", "path must stay inside"),
        ("30,,test", "path must stay inside"),
        ("30,./AgeDB/4.jpg,test", "written in one way only"),
        ("30,AgeDB,test", "path must name a regular file"),
        ("30,AgeDB/5.jpg,test", "path must name an image, got 'AgeDB/5.jpg', which is not in"),
        ('30,"AgeDB/4.jpg"x,test', "readable as CSV"),
        ('30,"AgeDB/4.jpg,test', "readable as CSV"),
        (f"30,{'a' * 200_000},test", "readable as CSV"),
        (f"30,{'a' * 5000},test", "path must name a file"),
    ],
)
def test_a_bad_row_is_refused_by_its_line(read: Callable[..., Splits], root: Path, row: str, message: str) -> None:
    evil = root.parent / "root-evil"
    evil.mkdir()
    (evil / "4.jpg").write_bytes(b"")
    (root / "AgeDB" / "link.jpg").symlink_to(evil / "4.jpg")
    (root / "out").symlink_to(evil)
    with pytest.raises(DataError, match=message) as caught:
        read([*ROWS[:4], row])
    assert f"{root.parent / 'list.csv'}, line 6: " in str(caught.value)


@pytest.mark.parametrize("header", ["", "age,path", "age,path,split,age", "31,AgeDB/0.jpg,train", "Age,path,split"])
def test_a_bad_header_is_refused(read: Callable[..., Splits], header: str) -> None:
    with pytest.raises(DataError, match=r"line 1: the header must name each of the columns age, path, split once"):
        read(header=header)


def test_files_that_are_not_text_are_refused(read: Callable[..., Splits], tmp_path: Path, root: Path) -> None:
    with pytest.raises(DataError, match="UnicodeDecodeError"):
        read(b"age,path,split\n31,AgeDB/\xff.jpg,train\n")
    with pytest.raises(DataError, match="FileNotFoundError"):
        dir_list(tmp_path / "none.csv", root, source="agedb_dir")
    with pytest.raises(DataError, match="root must be a folder"):
        dir_list(tmp_path / "list.csv", root / "none", source="agedb_dir")


@pytest.mark.parametrize("lost", ["train", "val", "test"])
def test_each_split_holds_an_image(read: Callable[..., Splits], lost: str) -> None:
    with pytest.raises(DataError, match=f"list.csv: the {lost} split must hold at least one image"):
        read([row for row in ROWS if not row.endswith(lost)])


def test_a_row_that_stands_twice_counts_twice(read: Callable[..., Splits]) -> None:
    splits = read([*ROWS, ROWS[0]])
    assert splits.train.rows.tolist() == [0, 3, 0]
    assert len(splits.train.images) == 5


def test_missing_and_damaged_images_can_be_left_out(read: Callable[..., Splits], root: Path) -> None:
    (root / "AgeDB" / "0.jpg").unlink()
    (root / "AgeDB" / "1.jpg").write_bytes(b"no image")
    splits = read(on_error="skip")
    assert splits.skipped == {"missing file": 1, "unreadable image": 1}
    assert splits.train.labels.tolist() == [101]
    assert splits.test.labels.tolist() == [0]


def test_mutated_lists_give_our_error_or_splits(
    read: Callable[..., Splits], mutations: Callable[..., Iterator[bytes]]
) -> None:
    valid = "\n".join(["age,path,split", *ROWS, '7,"AgeDB/0.jpg",train', ""]).encode()
    refused = 0
    for changed in mutations(valid, count=300, longest=12):
        try:
            assert len(read(changed, on_error="skip").train)
        except DataError:
            refused += 1
    assert 100 < refused < 300


@pytest.mark.parametrize("name", ["agedb_dir", "imdb_wiki_dir"])
def test_cards_match_the_reader(read_card: Callable[..., dict[str, Any]], name: str) -> None:
    card = read_card(name, dir_list)
    assert card["source"] == name
    assert list(card["fields"]) == ["age", "path", "split"]
    assert card["fields"]["age"]["unit"] == "year"
    assert set(card["splits"]) == {"train", "val", "test"}


def test_agedb_card_knows_the_published_sizes(read_card: Callable[..., dict[str, Any]]) -> None:
    card = read_card("agedb_dir", dir_list)
    assert card["splits"] == {"train": 12208, "val": 2140, "test": 2140}
    assert card["label_histogram"]["test"] == card["label_histogram"]["val"]
