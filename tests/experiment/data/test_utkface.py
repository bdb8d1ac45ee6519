"""UTKFace: names, the split rule by hand, folders and archives, and the data card."""

from __future__ import annotations

import hashlib
import io
import math
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dir_toolkit.errors import DataError
from dir_toolkit.experiment.data.archives import TarFiles
from dir_toolkit.experiment.data.utkface import utkface, utkface_age, utkface_dir_split
from dir_toolkit.labels.bins import Bins
from dir_toolkit.labels.density import LabelDensity

REPOSITORY = Path(__file__).parents[3]
REAL = Path(os.environ.get("DIR_TOOLKIT_UTKFACE", REPOSITORY.parent / "shared" / "data" / "utkface" / "UTKFace.tar.gz"))


def names_of(age: int, count: int) -> list[str]:
    return [f"{age}_{i % 2}_{i % 5}_{20170116000000000 + i}.jpg.chip.jpg" for i in range(count)]


@pytest.fixture
def faces(tmp_path: Path, jpeg: Callable[..., bytes]) -> Path:
    """Eight faces of 26 years and six of 80, with three files that are no faces."""
    folder = tmp_path / "data" / "UTKFace"
    folder.mkdir(parents=True)
    for seed, name in enumerate(names_of(26, 8) + names_of(80, 6)):
        (folder / name).write_bytes(jpeg(seed))
    for name in ("61_1_20170109142408075.jpg.chip.jpg", "README.txt", "117_0_0_20170109142408075.jpg.chip.jpg"):
        (folder / name).write_bytes(b"no face")
    return folder


def pack(folder: Path, archive: Path, mode: Any = "w:gz") -> Path:
    with tarfile.open(archive, mode) as tar:
        tar.add(folder, "UTKFace")
    return archive


@pytest.mark.parametrize(
    ("name", "age"),
    [
        ("1_0_0_20161219140623097.jpg.chip.jpg", 1),
        ("116_1_4_20170112213303693.jpg.chip.jpg", 116),
        ("24_0_1_20170116220224657 .jpg.chip.jpg", 24),
        ("55_0_0_20170116232725357jpg.chip.jpg", 55),
        ("39_1_20170116174525125.jpg.chip.jpg", None),
        ("-1_0_0_20170116174525125.jpg.chip.jpg", None),
        ("26_2_0_20170116174525125.jpg.chip.jpg", None),
        ("26_0_5_20170116174525125.jpg.chip.jpg", None),
        ("٢٦_0_0_20170116174525125.jpg.chip.jpg", None),
        ("26_0_0_20170116174525125.png", None),
        ("._26_0_0_20170116174525125.jpg.chip.jpg", None),
        ("", None),
    ],
)
def test_file_names_tell_the_age_or_none(name: str, age: int | None) -> None:
    assert utkface_age(name) == age


def test_the_split_follows_the_rule_worked_out_by_hand() -> None:
    names = names_of(37, 7)  # 7 // 3 = 2 test, 7 // 6 = 1 validation, all 4 others train
    order = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    assert utkface_dir_split(names) == {"test": order[:2], "val": order[2:3], "train": order[3:]}
    assert utkface_dir_split(reversed(names)) == utkface_dir_split(names)


@pytest.mark.parametrize(
    ("age", "count", "train", "val", "test"),
    [
        (26, 700, 600, 10, 20),  # 600 e^0, and 70 are left over
        (37, 700, 221, 10, 20),  # 600 / e = 220.7
        (15, 700, 221, 10, 20),
        (116, 90, 1, 10, 20),  # 600 e^(-90/11) = 0.17
        (90, 60, 2, 10, 20),  # 600 e^(-64/11) = 1.78
        (26, 59, 31, 9, 19),
        (26, 5, 4, 0, 1),
        (26, 2, 2, 0, 0),
        (26, 0, 0, 0, 0),
    ],
)
def test_the_sizes_of_the_split_are_those_worked_out_by_hand(
    age: int, count: int, train: int, val: int, test: int
) -> None:
    split = utkface_dir_split(names_of(age, count))
    assert {part: len(names) for part, names in split.items()} == {"train": train, "val": val, "test": test}
    assert len({name for names in split.values() for name in names}) == train + val + test


def test_the_split_refuses_names_that_do_not_parse() -> None:
    name = names_of(26, 1)[0]
    for bad, message in (
        (["a.jpg"], "got 'a.jpg'"),
        ([name, name], "must occur once"),
        (names_of(117, 1), "ages in .0, 117.*got"),
    ):
        with pytest.raises(DataError, match=message):
            utkface_dir_split(bad)


def test_folders_and_archives_give_the_same(faces: Path, tmp_path: Path) -> None:
    gz = pack(faces, tmp_path / "faces.tar.gz")
    (tmp_path / "holds").mkdir()
    pack(faces, tmp_path / "holds" / "UTKFace.tar", "w")
    roots = [faces, faces.parent, gz, str(gz), tmp_path / "holds"]
    results = [utkface(root, size=16, cache=tmp_path / "cache") for root in roots]
    for splits in results:
        # 26 years: 2 test, 1 val, 5 train; 80 years: 2 test, 1 val, 3 train
        assert [len(part) for part in (splits.train, splits.val, splits.test)] == [8, 2, 4]
        assert splits.test.labels.tolist() == [26, 26, 80, 80]
        assert splits.skipped == {"name does not parse": 2, "age outside [0, 117)": 1}
        assert splits.source == "utkface"
        assert splits.train.digest == results[0].train.digest
    assert splits.train.images.shape == (14, 3, 16, 16)


def test_images_go_with_their_names(faces: Path, tmp_path: Path) -> None:
    from dir_toolkit.experiment.data.cache import decode_image

    splits = utkface(faces, size=16, cache=tmp_path / "cache")
    split = utkface_dir_split(names_of(26, 8) + names_of(80, 6))
    for part in ("train", "val", "test"):
        images, ages = getattr(splits, part).batch(np.arange(len(split[part])))
        assert ages.tolist() == [utkface_age(name) for name in split[part]]
        for image, name in zip(images, split[part], strict=True):
            np.testing.assert_array_equal(image.numpy(), decode_image((faces / name).read_bytes(), 16))


def test_a_damaged_image_moves_no_other(faces: Path, tmp_path: Path) -> None:
    split = utkface_dir_split(names_of(26, 8) + names_of(80, 6))
    whole = utkface(faces, size=8, cache=tmp_path / "cache")
    (faces / split["test"][1]).write_bytes(b"\xff\xd8 no more")
    with pytest.raises(DataError, match=split["test"][1].replace(".", r"\.")):
        utkface(faces, size=8, cache=tmp_path / "cache")
    splits = utkface(faces, size=8, cache=tmp_path / "cache", on_error="skip")
    assert splits.skipped["unreadable image"] == 1
    assert splits.test.labels.tolist() == [26, 80, 80]
    assert (splits.train.digest, splits.val.digest) == (whole.train.digest, whole.val.digest)


def test_a_file_name_stands_for_one_face(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for folder in ("a", "b"):
            info = tarfile.TarInfo(f"{folder}/{names_of(26, 1)[0]}")
            info.size = len(jpeg())
            tar.addfile(info, io.BytesIO(jpeg()))
    with pytest.raises(DataError, match="a file name must stand for one face"):
        utkface(tmp_path / "twice.tar", cache=tmp_path / "cache")


def test_links_out_of_the_folder_are_refused(faces: Path, tmp_path: Path) -> None:
    face = faces / names_of(26, 1)[0]
    face.rename(tmp_path / "outside.jpg")
    face.symlink_to(tmp_path / "outside.jpg")
    with pytest.raises(DataError, match="must stay inside"):
        utkface(faces, cache=tmp_path / "cache")


def test_a_root_without_images_is_refused(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "none"):
        with pytest.raises(DataError, match="root must be the archive"):
            utkface(root, cache=tmp_path / "cache")


def test_too_few_images_to_split_are_refused(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    (tmp_path / names_of(26, 1)[0]).write_bytes(jpeg())
    with pytest.raises(DataError, match="the val split must hold at least one image"):
        utkface(tmp_path, cache=tmp_path / "cache")


@pytest.fixture
def card(read_card: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return read_card("utkface", utkface)


def test_the_card_matches_the_reader(card: dict[str, Any]) -> None:
    assert set(card["fields"]) == {"image", "age", "gender", "race", "date"}
    assert card["fields"]["age"]["unit"] == "year"
    rule = card["split_rule"]
    names = names_of(40, 3000)
    split = utkface_dir_split(names)
    assert len(split["test"]) == rule["most_test"] == 20
    assert len(split["val"]) == rule["most_val"] == 10
    assert len(split["train"]) == math.ceil(rule["peak"] * math.exp(-abs(40 - rule["peak_age"]) / rule["decay_years"]))


@pytest.mark.skipif(not REAL.is_file(), reason="needs UTKFace.tar.gz; name it in DIR_TOOLKIT_UTKFACE")
def test_the_card_matches_the_real_archive(card: dict[str, Any]) -> None:
    archive = TarFiles(REAL)
    if archive.digest() != card["digest"]:
        pytest.skip("another copy of UTKFace than the card describes")
    names = [name.rpartition("/")[2] for name in archive.names]
    parsed = [name for name in names if utkface_age(name) is not None]
    assert (len(names), len(names) - len(parsed)) == (card["files"], card["skipped"]["name does not parse"])
    ages = {part: [utkface_age(name) for name in chosen] for part, chosen in utkface_dir_split(parsed).items()}
    assert {part: len(values) for part, values in ages.items()} == card["splits"]
    for part, values in ages.items():
        assert np.bincount(np.array(values) // 10, minlength=12).tolist() == card["label_histogram"][part]
    bins = Bins.uniform(0, 117, width=1)
    regions = LabelDensity.count(ages["train"], bins).regions()
    assert Counter(regions.tolist()) == card["regions"]["ages"]
    assert Counter(regions[ages["test"]].tolist()) == card["regions"]["test"]
