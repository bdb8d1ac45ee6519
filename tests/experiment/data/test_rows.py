"""Text files of rows, and the readers of tables, series and text: values by hand, refusals, and the data cards."""

from __future__ import annotations

import gzip
import os
import re
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dir_toolkit.errors import DataError, DirToolkitWarning
from dir_toolkit.experiment.data.images import Splits
from dir_toolkit.experiment.data.rows import columns_of, lines_of, numbers_of
from dir_toolkit.experiment.data.series import BEIJING_FEATURES, beijing, cmapss
from dir_toolkit.experiment.data.tables import standardized, table
from dir_toolkit.experiment.data.text import emobank, sts_b_dir, word_vectors, words_of

REPOSITORY = Path(__file__).parents[3]
REAL = Path(os.environ.get("DIR_TOOLKIT_DATA", REPOSITORY.parent / "shared" / "data"))
real = pytest.mark.skipif(not (REAL / "tables").is_dir(), reason="the real tables, series and texts are not there")

TABLE = "\ufeffy, x,sex\n1,0.5,F\n2,1.5,M\n3,-1,F\n4,0,I\n5,2,F\n"


def write(path: Path, text: str, *, packed: bool = False) -> Path:
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_a_table_gives_the_features_worked_out_by_hand(tmp_path: Path, packed: bool) -> None:
    splits = table(write(tmp_path / "some.csv", TABLE, packed=packed), "y", seed=1)
    assert splits.source == "some"
    np.testing.assert_array_equal(
        splits.train.inputs, [[0.5, 1, 0, 0], [1.5, 0, 0, 1], [-1, 1, 0, 0], [0, 0, 1, 0], [2, 1, 0, 0]]
    )
    parts = (splits.train, splits.val, splits.test)
    assert [len(part) for part in parts] == [3, 1, 1]
    assert sorted(np.concatenate([part.rows for part in parts])) == [0, 1, 2, 3, 4]
    for part in parts:
        np.testing.assert_array_equal(part.labels, part.rows + 1)


def test_standardized_by_the_training_rows(tmp_path: Path) -> None:
    splits = standardized(table(write(tmp_path / "some.csv", TABLE), "y", drop=["sex"]))
    inputs = splits.train.inputs[splits.train.rows]
    np.testing.assert_allclose([inputs.mean(), inputs.std()], [0, 1], atol=1e-7)
    assert splits.test.inputs is splits.train.inputs


def test_one_column_to_drop_needs_no_list(tmp_path: Path) -> None:
    one, several = (table(write(tmp_path / "some.csv", TABLE), "y", drop=drop) for drop in ("sex", ["sex"]))
    np.testing.assert_array_equal(one.train.inputs, several.train.inputs)


def test_a_column_with_any_word_is_of_words(tmp_path: Path) -> None:
    splits = table(write(tmp_path / "some.csv", "y,x\n1,a\n2,\n3,1\n4,a\n5,1\n"), "y")
    np.testing.assert_array_equal(splits.train.inputs, [[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 0]])


def test_a_column_of_numbers_with_a_word_is_told_of(tmp_path: Path) -> None:
    text = "y,x\n" + "".join(f"{i},{i}\n" for i in range(9)) + "9,NA\n"
    with pytest.warns(
        DirToolkitWarning, match=r"the 10 different cells of column 'x' become .* such as 'NA', if they should be\.$"
    ):
        assert table(write(tmp_path / "some.csv", text), "y").train.inputs.shape == (10, 10)


def test_a_constant_column_becomes_zero(tmp_path: Path) -> None:
    text = "y,x\n" + "".join(f"{i},7\n" for i in range(6))
    assert not standardized(table(write(tmp_path / "some.csv", text), "y")).train.inputs.any()


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (TABLE, {"label": "z"}, "the file must have a column 'z', got y, x, sex"),
        (TABLE, {"label": "y", "drop": ["w"]}, "must have a column 'w'"),
        (TABLE, {"label": "sex"}, r"some.csv, row 1: column 'sex' must hold finite numbers, got 'F'"),
        (TABLE, {"label": "y", "drop": ["x", "sex"]}, "must have a feature and at least 5 rows, got 0 and 5"),
        ("y,x\n1,2\n3\n", {"label": "y"}, "some.csv, line 3: a row must have 2 cells, got 1"),
        ("y,x,x\n1,2,3\n", {"label": "y"}, "line 1: a column name must occur once, got 'x'"),
        ("y,x\n", {"label": "y"}, "must hold a row below the names"),
        ("", {"label": "y"}, "must hold a row below the names"),
        ("y,x\n1,\n2,3\n", {"label": "y"}, "row 1: column 'x' must hold finite numbers, got ''"),
        ("y,x\n1_0,2\n", {"label": "y"}, "row 1: column 'y' must hold finite numbers, got '1_0'"),
        ('y,x\n1,"2\n', {"label": "y"}, "must be readable as CSV"),
        ("y,x\n" + "".join(f"{i},w{i}\n" for i in range(101)), {"label": "y"}, r"at most 100 different .* Pass drop="),
    ],
)
def test_tables_that_do_not_fit_are_refused(tmp_path: Path, text: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        table(write(tmp_path / "some.csv", text), **options)


def test_files_that_are_not_text_are_refused(tmp_path: Path) -> None:
    whole = gzip.compress(TABLE.encode())
    (tmp_path / "cut").write_bytes(whole[:-9])
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    for name in ("cut", "latin", "none"):
        with pytest.raises(DataError, match=f"{name}: the file must be whole, and text in UTF-8"):
            lines_of(tmp_path / name)
    with pytest.raises(
        DataError, match=r"emobank.csv, packed with gzip or not, got .*data_cards/emobank\.md"
    ) as caught:
        emobank(tmp_path, {})
    assert Path(str(caught.value).rpartition(". ")[2].removesuffix(" tells where to get it.")).is_file()


def test_lines_end_with_line_feeds_alone(tmp_path: Path) -> None:
    assert lines_of(write(tmp_path / "some.txt", "a\u2028b\r\n\x85c\n")) == ["a\u2028b", "\x85c"]


def test_missing_numbers_are_nan_where_they_are_named() -> None:
    np.testing.assert_array_equal(numbers_of(["1", " NA", "-2e1"], "x", Path("f"), missing=("NA",)), [1, np.nan, -20])
    with pytest.raises(DataError, match="f, row 2"):
        numbers_of(["1", "NA"], "x", Path("f"))
    with pytest.raises(DataError, match="got 'inf'"):
        numbers_of(["inf"], "x", Path("f"))
    with pytest.raises(DataError, match="got '1_0'"):
        numbers_of(["1_0"], "x", Path("f"))
    with pytest.raises(DataError, match="got '1e39'"):
        numbers_of(["1e39"], "x", Path("f"))


def air(tmp_path: Path, hours: int, **changed: str) -> Path:
    rows = ["No,year,month,day,hour,PM2.5,TEMP,PRES,DEWP,RAIN,wd,WSPM"]
    for i in range(hours):
        label, temp = changed.get(f"label{i}", str(i)), changed.get(f"temp{i}", str(i))
        time = datetime(2013, 3, 1) + timedelta(hours=i + (i >= int(changed.get("gap", hours))))
        date = f"{time.year},{time.month},{time.day},{time.hour}"
        rows.append(f'{i},{date},{label},{temp},1000,-3,0,"E",1.5')
    write(tmp_path / "beijing_somewhere.csv", "\n".join(rows))
    return tmp_path


def test_windows_of_beijing_are_those_worked_out_by_hand(tmp_path: Path) -> None:
    before = 50
    splits = beijing(air(tmp_path, 366 * 24 + before, label5="NA", temp7="NA"), "Somewhere", hours=3)
    # 40 hours train, 10 validate; windows do not reach into the part before.
    assert splits.train.labels.tolist() == [2, 3, 4, *range(6, 40)]
    assert splits.val.labels.tolist() == list(range(42, 50))
    assert (splits.test.labels[0], len(splits.test)) == (52, 366 * 24 - 2)
    assert splits.skipped == {"without label": 1}
    inputs, labels = splits.train.batch(np.array([5]))
    assert labels.item() == 8
    assert inputs[0, :, 0].tolist() == [6, 6, 8]  # the gap at 7 holds what came before
    east, north = (BEIJING_FEATURES.index(f"wind {word}") for word in ("east", "north"))
    np.testing.assert_allclose(inputs[0, 0, [east, north]], [1, 0], atol=1e-7)
    assert not splits.train.inputs.flags.writeable


def test_no_window_of_beijing_reaches_over_hours_that_are_missing(tmp_path: Path) -> None:
    splits = beijing(air(tmp_path, 366 * 24 + 50, gap="20", label21="NA"), "Somewhere", hours=3)
    assert splits.train.labels.tolist() == [*range(2, 20), *range(22, 40)]
    assert splits.skipped == {"without label": 1, "after a gap": 1}  # the hours at 20 and 21, of which one has no label


def test_recordings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must hold more than 8785 hours, got 30"):
        beijing(air(tmp_path, 30), "Somewhere")
    whole = air(tmp_path, 366 * 24 + 50) / "beijing_somewhere.csv"
    for hour in ("2013,2,29,0", "2013,13,1,0", "2013,3,1,24", "2013,3,0,0", "2013.5,3,1,0", "1e+30,3,1,0", "-1,3,1,0"):
        write(whole, whole.read_text().replace("2013,3,1,5,", f"{hour},", 1))
        with pytest.raises(DataError, match=rf"row 6: year.* must exist, got {re.escape(hour.replace(',', ', '))}\."):
            beijing(tmp_path, "Somewhere")
        write(whole, whole.read_text().replace(f"{hour},", "2013,3,1,5,", 1))
    write(tmp_path / "beijing_elsewhere.csv", "hour,PM2.5\n1,2\n")
    with pytest.raises(DataError, match="must have a column 'year'"):
        beijing(tmp_path, "Elsewhere")


def engines(folder: Path, **changed: str) -> Path:
    def lines(lives: dict[int, int]) -> str:
        cells = [
            (e, c, *(f"{100 * e + c}.0" for _ in range(24))) for e, life in lives.items() for c in range(1, life + 1)
        ]
        return "".join(" ".join(map(str, row)) + "  \n" for row in cells)

    texts = {"train": lines({1: 4, 5: 3}), "test": lines({1: 1, 2: 4}), "RUL": "RUL\n7 \n200 \n"} | changed
    for name, text in texts.items():
        write(folder / f"{name}_FD001.txt", text)
    return folder


def test_windows_of_engines_are_those_worked_out_by_hand(tmp_path: Path) -> None:
    splits = cmapss(engines(tmp_path), cycles=2, cap=100)
    assert splits.train.labels.tolist() == [2, 1, 0]
    assert splits.val.labels.tolist() == [1, 0]
    assert splits.test.labels.tolist() == [7, 100]
    inputs, _ = splits.train.batch(np.arange(3))
    assert inputs[:, :, 0].tolist() == [[101, 102], [102, 103], [103, 104]]
    inputs, _ = splits.test.batch(np.arange(2))
    assert inputs[:, :, 3].tolist() == [[101, 101], [203, 204]]  # the first engine has one cycle only


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"RUL": "7\n"}, "as many as the engines in test_FD001.txt, got 1 lives for 2 engines"),
        ({"RUL": "7\n-3\n"}, "the lives must be >= 0, .* got 2 lives for 2 engines, the least -3"),
        ({"train": "1.5 1" + " 0" * 24}, "an engine must have a whole number from 0 on, got 1.5"),
        ({"train": "-5 1" + " 0" * 24}, "an engine must have a whole number from 0 on, got -5"),
        ({"train": "1e10 1" + " 0" * 24}, "an engine must have a whole number from 0 on, got 1e\\+10"),
        ({"train": "1 1" + " 1e39" * 24}, "train_FD001.txt, line 1: a line must hold finite numbers, got .*1e"),
        ({"RUL": "7\n2_0\n"}, "RUL_FD001.txt, line 2: a line must hold numbers, got '2_0' is no number"),
        ({"train": "\n"}, "train_FD001.txt: the file must hold an engine, got none"),
        ({"train": "1 1" + " 0" * 24}, "train_FD001.txt: the val split must hold at least one row"),
        ({"RUL": "7\nx\n"}, "RUL_FD001.txt, line 2: a line must hold numbers"),
        ({"train": "1 1 2\n"}, "train_FD001.txt, line 1: a line must hold 26 numbers, got 3"),
        ({"train": "1 2" + " 0" * 24}, "engine 1 must go on with cycle 1, got cycle 2"),
    ],
)
def test_engines_that_do_not_fit_are_refused(tmp_path: Path, changed: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        cmapss(engines(tmp_path, **changed), cycles=2)


def test_a_cap_of_lives_is_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cap must be > 0, got -5"):
        cmapss(engines(tmp_path), cap=-5)


def test_words_get_their_vectors(tmp_path: Path) -> None:
    assert words_of("Don't  pay 3.50€") == ["don", "'", "t", "pay", "3", ".", "50", "€"]
    write(tmp_path / "glove_100d.txt", "a 1 2\nb -1 0.5\n", packed=False)
    number, vectors = word_vectors(tmp_path)
    assert number == {"a": 1, "b": 2}
    np.testing.assert_array_equal(vectors, [[0, 0], [1, 2], [-1, 0.5]])
    write(tmp_path / "glove.6B.100d.txt", "c 3 4\n")  # the name that Stanford gives the file goes first
    assert word_vectors(tmp_path)[0] == {"c": 1}
    for text in ("a 1 2\nb 1_0 2\n", "a 1e39\n", "a 1 2\nb 1\n", "a 1\na 2\n", "a\n", "a 1\nb x\n", ""):
        write(tmp_path / "bad.txt", text)
        with pytest.raises(DataError, match=r"bad.txt"):
            word_vectors(tmp_path, "bad.txt")


def test_sentences_become_the_numbers_worked_out_by_hand(tmp_path: Path) -> None:
    text = 'id,split,V,A,D,text\n1,train,3,2,1,"B, a?"\n2,dev,4,3,3,c\n3,test,1.5,3,3,A A A A\n'
    splits = emobank(write(tmp_path / "emobank.csv", text).parent, {"a": 1, "b": 2}, longest=3)
    assert splits.train.inputs.tolist() == [[2, 1, 0], [0, 0, 0], [1, 1, 1]]
    assert (splits.train.labels.tolist(), splits.test.labels.tolist()) == ([3], [1.5])
    for part in ("train", "dev", "test"):
        pairs = 'index\tsentence1\tsentence2\tscore\n0\ta "quote\tb a\t2.5\n'
        write(tmp_path / f"stsb_dir_{part}.tsv", pairs)
    splits = sts_b_dir(tmp_path, {"a": 1, "b": 2}, longest=2)
    assert splits.val.inputs.tolist() == [[[1, 0], [2, 1]]]
    assert splits.val.labels.tolist() == [2.5]
    high = "index\tsentence1\tsentence2\tscore\n0\ta\tb\t9\n"
    with pytest.raises(DataError, match=r"row 1: column 'score' must hold finite numbers from 0 to 5, got '9'"):
        sts_b_dir(write(tmp_path / "stsb_dir_dev.tsv", high).parent, {"a": 1})
    more = write(tmp_path / "emobank.csv", text + "4,later,3,3,3,a\n")
    assert emobank(more.parent, {}).skipped == {"of another split": 1}
    with pytest.raises(DataError, match=r"row 4: column 'V' must hold finite numbers from 1 to 5, got '7'"):
        emobank(write(tmp_path / "emobank.csv", text + "4,dev,7,3,3,a\n").parent, {})
    with pytest.raises(DataError, match="must have a column 'text'"):
        emobank(write(tmp_path / "emobank.csv", "split,V\ntrain,3\n").parent, {})


@pytest.mark.filterwarnings("ignore:.*become one feature each:dir_toolkit.errors.DirToolkitWarning")
def test_mutated_files_give_our_error_or_columns(tmp_path: Path, mutations: Callable[..., Iterator[bytes]]) -> None:
    refused = 0
    for packed in (False, True):
        valid = gzip.compress(TABLE.encode()) if packed else TABLE.encode()
        for changed in mutations(valid, count=150, longest=9):
            (tmp_path / "some.csv").write_bytes(changed)
            try:
                assert columns_of(tmp_path / "some.csv")
                assert len(table(tmp_path / "some.csv", "y").train)
            except DataError:
                refused += 1
    assert 150 < refused < 300


def card(name: str) -> dict[str, Any]:
    text = (REPOSITORY / "data_cards" / f"{name}.md").read_text("utf-8")
    facts: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])["dir_toolkit"]
    return facts


def same_as_card(facts: dict[str, Any], splits: Splits) -> None:
    for part, size in facts["splits"].items():
        labels = getattr(splits, part).labels
        assert len(labels) == size
        assert np.histogram(labels, facts["histogram_edges"])[0].tolist() == facts["label_histogram"][part]
    assert splits.skipped == facts.get("skipped", {})


@real
@pytest.mark.parametrize("name", ["abalone", "airfoil", "appliances_energy", "concrete", "house16H", "rain_ibk"])
def test_the_cards_of_tables_match_the_files(name: str) -> None:
    facts = card("tables")["sets"][name]
    splits = table(REAL / "tables" / f"{name}.csv.gz", facts["label"], drop=facts["drop"])
    same_as_card(facts, splits)
    assert splits.train.inputs.shape[1] == facts["features"]


@real
def test_the_cards_of_series_and_text_match_the_files() -> None:
    same_as_card(card("beijing"), beijing(REAL / "series"))
    same_as_card(card("cmapss"), cmapss(REAL / "series"))
    number, vectors = word_vectors(REAL / "text")
    assert vectors.shape == (len(number) + 1, 100)
    same_as_card(card("emobank"), emobank(REAL / "text", number))
    same_as_card(card("sts_b_dir"), sts_b_dir(REAL / "text", number))
