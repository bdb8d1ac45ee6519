"""Files from outside, damaged and hostile: our own error or a valid result comes out, and nothing else happens.

``pytest tests/attack/test_mutations.py --mutations 10000`` is the full attack.
"""

from __future__ import annotations

import gzip
import io
import os
import random
import re
import resource
import struct
import tarfile
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import dir_toolkit as dt
from dir_toolkit.errors import DirToolkitError
from dir_toolkit.experiment.data import series
from dir_toolkit.experiment.data.archives import FolderFiles, TarFiles, stays_inside
from dir_toolkit.experiment.data.cache import decode_once
from dir_toolkit.experiment.data.dir_lists import dir_list
from dir_toolkit.experiment.data.idx import read_idx
from dir_toolkit.experiment.data.images import Splits
from dir_toolkit.experiment.data.series import beijing, cmapss
from dir_toolkit.experiment.data.tables import standardized, table
from dir_toolkit.experiment.data.text import emobank, sts_b_dir, word_vectors
from dir_toolkit.experiment.results.schema import combine_runs, load_results, save_results, validate_results
from dir_toolkit.experiment.training.checkpoint import load_checkpoint
from dir_toolkit.longtail.saving import _FORMAT, _MADE_WITH, _digest

pytest.importorskip("PIL")
safetensors = pytest.importorskip("safetensors.torch")

GIGABYTE = 2**30
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1)


def mutated(data: bytes, chance: random.Random) -> bytes:
    """One to three changes of the kinds that broken disks, cut downloads and attackers make."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        spot = chance.randrange(len(changed) + 1)
        end = min(len(changed), spot + chance.choice([1, 4, 30, 600, len(data)]))
        kind = chance.randrange(12)
        if kind <= 1 and spot < len(changed):
            changed[spot] ^= 1 << chance.randrange(8)
        elif kind == 2:
            del changed[spot:]
        elif kind == 3:
            del changed[spot:end]
        elif kind == 4:
            changed[spot:spot] = chance.randbytes(chance.choice([1, 4, 30, 600]))
        elif kind == 5:
            changed[spot:end] = chance.randbytes(end - spot)
        elif kind == 6:
            changed[spot:spot] = changed[spot:end]
        elif kind == 7:  # two neighbouring chunks swapped
            middle = (spot + end) // 2
            changed[spot:end] = changed[middle:end] + changed[spot:middle]
        elif kind == 8:  # an extreme number, as headers of either byte order hold them
            size = chance.choice([1, 2, 4, 8])
            number = chance.choice(EXTREMES) & (256**size - 1)
            changed[spot : spot + size] = number.to_bytes(size, chance.choice(["big", "little"]))
        elif kind == 9:  # and as text
            number = chance.choice([0, 7, 8, 9, 99999999, 77777777777, 10**30, -1])
            changed[spot : spot + 12] = str(number).encode()
        elif kind == 10:  # a cell of a table with what is no number, or none that is usable
            first = spot - len(re.split(rb"[\s,]", changed[:spot])[-1])
            last = spot + len(re.split(rb"[\s,]", changed[spot:])[0])
            changed[first:last] = chance.choice([b"", b"NA", b"nan", b"inf", b"1e39", b"1e308", b"1_0", b"-1", b"0.5"])
        else:
            changed[spot:end] = bytes(end - spot)
    return bytes(changed) if chance.random() > 0.01 else chance.randbytes(chance.randrange(len(data) + 1))


@contextmanager
def a_gigabyte_more() -> Iterator[None]:
    """No more memory than there is now and one gigabyte."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + GIGABYTE, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class Arena:
    """Folders in which one reader is attacked, of which it may write to the cache alone."""

    def __init__(self, folder: Path) -> None:
        self.whole = folder
        self.inputs, self.cache, self.rest = (folder / "in" / name for name in ("inputs", "cache", "rest"))
        for one in (self.inputs, self.cache, self.rest):
            one.mkdir(parents=True)
        self._as_it_was = self._outside()

    def write(self, name: str, data: bytes) -> Path:
        path = self.inputs / name
        path.write_bytes(data)
        self._as_it_was[path] = data
        return path

    def strays(self) -> list[str]:
        """Files and folders outside the cache that a reader made, changed or took away."""
        now, then = self._outside(), self._as_it_was
        return sorted(str(path) for path in {*now, *then} if now.get(path) != then.get(path))

    def _outside(self) -> dict[Path, bytes]:
        outcome: dict[Path, bytes] = {}
        for spot, folders, names in os.walk(self.whole):
            folders[:] = [name for name in folders if Path(spot, name) != self.cache]
            outcome |= dict.fromkeys((Path(spot, name) for name in folders), b"a folder")
            outcome |= {path: path.read_bytes() for path in (Path(spot, name) for name in names)}
        return outcome


@pytest.fixture
def arena(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Arena:
    arena = Arena(tmp_path)
    monkeypatch.chdir(arena.rest)
    monkeypatch.setenv("HOME", str(arena.rest))
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # of what is thrown away at once
    monkeypatch.setattr(series, "_TEST_FROM", 10)  # hours, so that a file can be short
    return arena


def jpeg(seed: int) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), np.uint8)
    Image.fromarray(pixels).save(out, "JPEG", progressive=bool(seed % 2))
    return out.getvalue()


def tar(form: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name, data in {"faces/1.jpg": b"one", "faces/" + "x" * 80 + ".jpg": b"2" * 700, "é.jpg": b""}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


IDX = bytes([0, 0, 8, 3]) + struct.pack(">3I", 4, 5, 6) + bytes(range(120))
LIST = "age,path,split\n" + "".join(f"{20 + i},{i}.jpg,{('train', 'val', 'test')[i % 3]}\n" for i in range(6))


def checkpoint() -> bytes:
    out = io.BytesIO()
    model = torch.nn.Linear(5, 3)
    torch.save({"model": model.state_dict(), "epoch": 3, "history": [{"loss": 0.5}], "name": "run"}, out)
    return out.getvalue()


def result() -> xr.Dataset:
    bins = dt.Bins.uniform(0, 4, width=1)
    target = torch.tensor([0.5, 1.5, 2.5, 2.75])
    outcome = dt.regression_metrics(target + 0.25, target, dt.LabelDensity(bins, np.array([200, 50, 5, 0])))
    years = {"units": "label"}
    labels, guesses = target.numpy(), (target + 0.25).numpy()
    run = outcome.assign({"target": ("sample", labels, years), "prediction": ("sample", guesses, years)})
    runs = {("vanilla", 0): run, ("lds", 1): run}
    return combine_runs(runs, title="t", command="c", label_name="age", label_units="years")


def results_file() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        save_results(result(), path := Path(folder, "results.nc"))
        return path.read_bytes()


def reads_idx(arena: Arena, data: bytes) -> None:
    array = read_idx(arena.write("a.idx", data))
    assert array.ndim >= 1
    assert array.size >= 1
    assert array.nbytes < 1032 * len(data)


def reads_checkpoint(arena: Arena, data: bytes) -> None:
    state = load_checkpoint(arena.write("c.pt", data))
    assert isinstance(state, dict)


def reads_results(arena: Arena, data: bytes) -> None:
    validate_results(load_results(arena.write("r.nc", data)))


def reads_tar(arena: Arena, data: bytes) -> None:
    files = TarFiles(arena.write("faces.tar", data))
    files.digest()
    contents = dict(files.read(files.names))
    assert list(contents) == files.names
    assert all(map(stays_inside, files.names))


def reads_list(arena: Arena, data: bytes) -> None:
    for i in range(6):
        if not (arena.inputs / f"{i}.jpg").exists():
            arena.write(f"{i}.jpg", jpeg(i))
    splits = dir_list(arena.write("list.csv", data), arena.inputs, source="faces", size=8, cache=arena.cache)
    for part in (splits.train, splits.val, splits.test):
        assert ((part.labels >= 0) & (part.labels <= 200)).all()
        assert part.images.shape[1:] == (3, 8, 8)


def sound(splits: Splits) -> None:
    for part in (splits.train, splits.val, splits.test):
        assert len(part) >= 1
        assert np.isfinite(part.labels).all()
        assert np.isfinite(part.inputs[part.rows]).all()


def reads_table(arena: Arena, data: bytes) -> None:
    sound(standardized(table(arena.write("some.csv", data), "y")))


def reads_air(arena: Arena, data: bytes) -> None:
    arena.write("beijing_somewhere.csv", data)
    sound(beijing(arena.inputs, "Somewhere", hours=3))


def reads_engines(arena: Arena, data: bytes) -> None:
    """All three files from one text, at the marks between them."""
    parts = data.split(b"%%")
    for name, part in zip(("train", "test", "RUL"), [*parts, b"", b""], strict=False):
        arena.write(f"{name}_FD001.txt", part)
    sound(cmapss(arena.inputs, cycles=2))


def reads_words(arena: Arena, data: bytes) -> None:
    arena.write("glove_100d.txt", data)
    number, vectors = word_vectors(arena.inputs)
    assert len(vectors) == len(number) + 1
    assert np.isfinite(vectors).all()


def reads_sentences(arena: Arena, data: bytes) -> None:
    arena.write("emobank.csv", data)
    sound(emobank(arena.inputs, {"a": 1, "b": 2}, longest=3))


def reads_pairs(arena: Arena, data: bytes) -> None:
    for part in ("train", "dev", "test"):
        arena.write(f"stsb_dir_{part}.tsv", data if part == "dev" else PAIRS.encode())
    sound(sts_b_dir(arena.inputs, {"a": 1, "b": 2}, longest=3))


TABLE = "y, x,sex\n" + "".join(f"{i},{i / 2},{'FMI'[i % 3]}\n" for i in range(9))
WORDS = "".join(f"w{i} {i}.5 -1 {i}e-3\n" for i in range(8))
SENTENCES = "split,V,text\n" + "".join(f'{("train", "dev", "test")[i % 3]},{1 + i % 5},"a, b {i}"\n' for i in range(9))
PAIRS = "sentence1\tsentence2\tscore\n" + "".join(f'a "q {i}\tb\t{i}.25\n' for i in range(5))


def air(hours: int) -> str:
    rows = ["year,month,day,hour,PM2.5,TEMP,PRES,DEWP,RAIN,wd,WSPM"]
    times = (datetime(2016, 2, 28) + timedelta(hours=i) for i in range(hours))
    rows += [
        f'{t.year},{t.month},{t.day},{t.hour},{"NA" if i == 7 else i},{i},1000,-3,0,"E",1.5'
        for i, t in enumerate(times)
    ]
    return "\n".join(rows)


def engines() -> str:
    def lines(lives: dict[int, int]) -> str:
        zeros = " 0.5" * 24
        return "".join(f"{e} {c}{zeros}\n" for e, life in lives.items() for c in range(1, life + 1))

    return f"{lines({1: 4, 5: 3})}%%{lines({1: 1, 2: 4})}%%7\n200\n"


def saved_model() -> bytes:
    bins = dt.Bins.uniform(0, 4, width=1)
    model = dt.LongTailModel(
        torch.nn.Linear(3, 3), 3, bins, density=dt.LabelDensity(bins, np.array([50, 40, 20, 10])), sigma=0.5
    )
    model.calibrate_intervals(torch.zeros(200, 4), torch.arange(200) / 50)
    with tempfile.TemporaryDirectory() as folder:
        model.save(path := Path(folder, "model"))
        return path.read_bytes()


def reads_model(arena: Arena, data: bytes) -> None:
    backbone = torch.nn.Linear(3, 3)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    try:
        dt.load(arena.write("model", data), backbone)
    except DirToolkitError:
        assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
        raise


def forged_model(data: bytes) -> bytes:
    """A model whose settings are these bytes, with the checksum that belongs to them."""
    tensors = safetensors.load(saved_model())
    tensors[_MADE_WITH] = torch.frombuffer(bytearray(data or b" "), dtype=torch.uint8)
    return safetensors.save(tensors, {"format": _FORMAT, "sha256": _digest(tensors)})


def reads_forged_model(arena: Arena, data: bytes) -> None:
    reads_model(arena, forged_model(data))


def settings_of_a_model() -> bytes:
    return safetensors.load(saved_model())[_MADE_WITH].numpy().tobytes()


def reads_folder(arena: Arena, data: bytes) -> None:
    for name, content in {"a.jpg": jpeg(0), "b.jpg": data}.items():
        arena.write(name, content)
    files = FolderFiles(arena.inputs)
    names = [name for name in ("a.jpg", "b.jpg") if files.has(name, source="test")]
    skipping = decode_once(files, names, size=8, cache=arena.cache, on_error="skip")
    assert "a.jpg" in skipping.rows
    assert skipping.images.shape == (2, 3, 8, 8)
    if len(skipping.rows) == 1:
        decode_once(files, names, size=8, cache=arena.cache)  # which tells why


def reads_cache(arena: Arena, data: bytes) -> None:
    """What an earlier run left in the cache is no more to be trusted."""
    arena.write("a.jpg", jpeg(0))
    files = FolderFiles(arena.inputs)
    whole = decode_once(files, ["a.jpg"], size=8, cache=arena.cache, on_error="skip")
    next(arena.cache.glob("*.json")).write_bytes(data)
    for on_error in ("skip", "raise"):
        again = decode_once(files, ["a.jpg"], size=8, cache=arena.cache, on_error=on_error)
        assert (again.images == whole.images).all()


TARGETS: dict[str, tuple[Callable[[], bytes], Callable[[Arena, bytes], None]]] = {
    "idx": (lambda: IDX, reads_idx),
    "idx, packed": (lambda: gzip.compress(IDX, mtime=0), reads_idx),
    "jpeg": (lambda: jpeg(0), reads_folder),
    "progressive jpeg": (lambda: jpeg(1), reads_folder),
    "tar, ustar": (lambda: tar(tarfile.USTAR_FORMAT), reads_tar),
    "tar, GNU": (lambda: tar(tarfile.GNU_FORMAT), reads_tar),
    "tar, pax": (lambda: tar(tarfile.PAX_FORMAT), reads_tar),
    "tar, packed": (lambda: gzip.compress(tar(tarfile.PAX_FORMAT), mtime=0), reads_tar),
    "list": (LIST.encode, reads_list),
    "table": (TABLE.encode, reads_table),
    "table, packed": (lambda: gzip.compress(TABLE.encode(), mtime=0), reads_table),
    "air by the hour": (lambda: air(60).encode(), reads_air),
    "engines": (lambda: engines().encode(), reads_engines),
    "word vectors": (WORDS.encode, reads_words),
    "sentences": (SENTENCES.encode, reads_sentences),
    "pairs of sentences": (PAIRS.encode, reads_pairs),
    "saved model": (saved_model, reads_model),
    "settings of a saved model": (settings_of_a_model, reads_forged_model),
    "notes in the cache": (lambda: b'{"a.jpg": "it is cut short"}', reads_cache),
    "checkpoint": (checkpoint, reads_checkpoint),
    "results": (results_file, reads_results),
}


def refusal(read: Callable[[Arena, bytes], None], arena: Arena, data: bytes) -> DirToolkitError | None:
    """The error of ours with which a reader answered, None where it took the bytes; anything else goes through."""
    answer = None
    try:
        read(arena, data)
    except DirToolkitError as error:
        if re.search("MemoryError|allocate", str(error)):
            raise MemoryError(str(error)) from error
        answer = error
    named = answer is None or any(
        name in str(answer) for name in ["cache", *(path.name for path in arena.inputs.iterdir())]
    )
    assert named, f"the error names no file: {answer}"
    if strays := arena.strays():
        raise AssertionError(f"the reader wrote to {strays}")
    return answer


@pytest.mark.parametrize("place", ["evil", "rest/evil", "../evil", "inputs/a.idx"])
def test_what_a_reader_writes_outside_the_cache_is_seen(arena: Arena, place: str) -> None:
    """By way of the cache, to a file of its own or over an input with as many bytes."""
    arena.write("a.idx", IDX)

    def reads_and_writes(arena: Arena, data: bytes) -> None:
        (arena.cache / "fine").write_bytes(data)
        (arena.cache / ".." / place).write_bytes(data)

    with pytest.raises(AssertionError, match=rf"wrote to \['[^']*{Path(place).name}'\]"):
        refusal(reads_and_writes, arena, IDX[::-1])


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_not_mutated_is_read(arena: Arena, target: str) -> None:
    make, read = TARGETS[target]
    if target == "notes in the cache":
        with pytest.raises(DirToolkitError, match="it is cut short"):
            read(arena, make())
        read(arena, b"[" * 100_000)  # deeper than JSON can be read
    else:
        read(arena, make())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory in use is read from /proc")
@pytest.mark.filterwarnings("ignore:.*become one feature each:dir_toolkit.errors.DirToolkitWarning")
@pytest.mark.parametrize("target", TARGETS)
def test_mutations_end_in_our_error_or_a_valid_result(arena: Arena, target: str, mutations: int) -> None:
    make, read = TARGETS[target]
    valid, chance = make(), random.Random(target)
    refusal(read, arena, valid)
    refused = 0
    with a_gigabyte_more():
        for number in range(mutations):
            data = mutated(valid, chance)
            for left in arena.cache.iterdir():  # or each new one looks through those of all before
                left.unlink()
            try:
                refused += refusal(read, arena, data) is not None
            except Exception as error:
                raise AssertionError(f"mutation {number} of {target}: {type(error).__name__}: {error}") from error
    assert target == "notes in the cache" or refused > mutations // 10  # which is made anew
    print(f"{target}: {mutations} mutations, {refused} refused, {mutations - refused} read")


def patched(data: bytes, mark: bytes, offset: int, number: bytes) -> bytes:
    """``number`` written over what stands ``offset`` bytes behind the first ``mark``."""
    spot = data.index(mark) + offset
    return data[:spot] + number + data[spot + len(number) :]


def lying_tar(form: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """One member that claims four or sixteen gigabytes, in a header whose sums are right."""
    info = tarfile.TarInfo("faces/1.jpg")
    info.size, info.type = 2**32 if form == tarfile.USTAR_FORMAT else 2**34, kind
    return info.tobuf(form) + bytes(2048)


def packed(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


LYING_IDX = patched(IDX, b"\0\0\x08\x03", 4, struct.pack(">3I", 1024, 1024, 2047))
SIDES = struct.pack(">2H", 65500, 65500)
USTAR, GNU, PAX = tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT
# What is read, the lie, and what the refusal says of it.
LIES: list[tuple[str, Callable[[], bytes], str]] = [
    ("idx", lambda: LYING_IDX, "2,146,435,072"),
    ("idx, packed", lambda: packed(LYING_IDX), "2,146,435,072"),
    ("jpeg", lambda: patched(jpeg(0), b"\xff\xc0", 5, SIDES), "4,290,250,000 pixels"),
    ("progressive jpeg", lambda: patched(jpeg(1), b"\xff\xc2", 5, SIDES), "4,290,250,000 pixels"),
    ("tar, ustar", lambda: lying_tar(USTAR), "at most 33,554,432 bytes, got 4,294,967,296"),
    ("tar, GNU", lambda: lying_tar(GNU), "at most 33,554,432 bytes, got 17,179,869,184"),
    ("tar, GNU", lambda: lying_tar(GNU, tarfile.GNUTYPE_LONGNAME), "bytes of names, one claims 17,179,869,184"),
    ("tar, pax", lambda: lying_tar(PAX), "the pax record 'size'"),
    ("tar, pax", lambda: lying_tar(USTAR, tarfile.XHDTYPE), "bytes of names, one claims 4,294,967,296"),
    ("tar, packed", lambda: packed(lying_tar(USTAR)), "at most 33,554,432 bytes, got 4,294,967,296"),
    ("tar, packed", lambda: packed(lying_tar(PAX)), "the pax record 'size'"),
    ("tar, packed", lambda: packed(lying_tar(USTAR, tarfile.XHDTYPE)), "bytes of names, one claims 4,294,967,296"),
    ("checkpoint", lambda: patched(checkpoint(), b"PK\x01\x02", 20, struct.pack("<2I", 2**32 - 16, 2**32 - 16)), "EOF"),
    ("saved model", lambda: patched(saved_model(), b"", 0, struct.pack("<Q", 2**40)), "header too large"),
    ("results", lambda: patched(results_file(), b"\0\0\0\x03bin\0", 8, struct.pack(">I", 2**31 - 1)), "2147483647"),
]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory in use is read from /proc")
@pytest.mark.parametrize(("target", "lie", "words"), LIES)
def test_a_header_that_claims_gigabytes_is_refused_and_nothing_of_it_allocated(
    arena: Arena, target: str, lie: Callable[[], bytes], words: str
) -> None:
    make, read = TARGETS[target]
    read(arena, make())
    data = lie()
    tracemalloc.start()
    try:
        with a_gigabyte_more():
            answer = refusal(read, arena, data)
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()
    assert words in str(answer)


def test_every_target_whose_headers_tell_sizes_is_lied_to() -> None:
    without = {"list", "notes in the cache", "settings of a saved model", "air by the hour", "engines"}
    without |= {"table", "table, packed", "word vectors", "sentences", "pairs of sentences"}
    assert {*TARGETS} - {target for target, _, _ in LIES} == without
