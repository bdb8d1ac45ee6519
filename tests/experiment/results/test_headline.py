"""The first sentences of a report, on results whose winner is known."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import xarray as xr

from dir_toolkit.experiment.results.headline import headline

Combine = Callable[..., xr.Dataset]


@pytest.fixture
def four(predicted: Callable[..., xr.Dataset], combine: Combine) -> xr.Dataset:
    """Sixty samples in two bins of the regions many and medium, two seeds, and errors that hardly vary.

    ``plain`` errs by 0.2 and 0.8, ``good`` by 0.3 and 0.4, ``near`` nearly like ``plain``.
    """
    target = np.repeat([0.5, 1.5], 30)
    wobble = 0.01 * np.tile([1.0, -1.0], 30)

    def run(first: float, second: float, sign: float = 1) -> xr.Dataset:
        return predicted(target, target + np.repeat([first, second], 30) + sign * wobble)

    runs = {("plain", s): run(0.2, 0.8) for s in (0, 1)}
    runs |= {("near", s): run(0.2, 0.799, -1) for s in (0, 1)}
    runs |= {("good", s): run(0.3, 0.4) for s in (0, 1)}
    return combine({**runs, ("constant", 0): run(0.9, 2.0)})


def test_it_says_who_won_by_how_much_and_at_what_price(four: xr.Dataset) -> None:
    text = headline(four)
    first, price, following = re.split(r"\. (?:The price: |It )", text)
    assert first.startswith(
        "good wins with the least bMAE, 0.350 years: 0.150 less than plain, or 30 % (95 % interval: 0."
    )
    assert price.startswith("MAE many is 0.300 years, 0.100 more (0.")
    assert price.endswith(" more)")
    assert following.startswith("also differs from the next best, near, beyond noise (0.150 less; 95 % interval: 0.")
    assert "seed" not in text


def test_what_is_not_apart_from_noise_is_not_a_win(four: xr.Dataset) -> None:
    text = headline(four.sel({"method": ["plain", "near"], "seed": [0]}))
    assert text.startswith("Nobody wins beyond noise: near has the least bMAE, 0.500 years, ")
    assert "less to 0.0" in text
    assert text.endswith("Of one seed, intervals hold the chance of the test samples alone.")


def test_the_best_is_compared_with_the_baseline_and_with_the_next(four: xr.Dataset) -> None:
    assert headline(four, "good").startswith("good wins with the least bMAE, 0.350 years: 0.150 less than near")
    assert "0.150 less than near" in headline(four, "near")
    with pytest.raises(ValueError, match=r"headline: baseline must be one of 'plain', .*, got 'lds'"):
        headline(four, "lds")
    with pytest.raises(ValueError, match="headline: level must be > 0 and < 1, got 95"):
        headline(four, level=95)


def test_a_constant_that_no_method_beats_is_named(four: xr.Dataset) -> None:
    four["bmae"].loc[{"method": "constant", "region": "all", "seed": 0}] = 0.25
    assert headline(four).startswith("No method beats the constant predictor, whose bMAE is 0.250 years. good wins")


def test_without_predictions_or_rivals_it_claims_nothing(ds: xr.Dataset, compared: xr.Dataset) -> None:
    unknown = "whether it is better than {} beyond noise is not known, since no seed has predictions of both."
    assert headline(ds) == f"lds has the least bMAE, 4.00 years; {unknown.format('vanilla')}"
    assert headline(compared.sel({"method": ["plain", "alone"]})).endswith(unknown.format("alone"))
    assert headline(ds.sel({"method": ["lds", "constant"]})).endswith("nothing to be compared with.")
    assert headline(ds.sel({"method": ["constant"]})) == "No method has a finished run."


def test_one_sample_per_bin_is_no_evidence(predicted: Callable[..., xr.Dataset], combine: Combine) -> None:
    alone, many = np.array([0.5, 1.5]), np.append(np.full(30, 0.5), 1.5)
    two = combine({("plain", 0): predicted(alone, alone + 0.4), ("good", 0): predicted(alone, alone + 0.3)})
    why = "is better than plain beyond noise is not known, since more samples or seeds are needed"
    assert headline(two) == f"good has the least bMAE, 0.300 years; whether it {why}."
    error = np.append(0.6 + 0.01 * np.tile([1.0, -1.0], 15), 0.2)
    good = predicted(many, many + np.append(np.full(30, 0.1), 0.3))
    text = headline(combine({("plain", 0): predicted(many, many + error), ("good", 0): good}))
    assert text.startswith("good wins")
    assert "No region is worse than with plain beyond noise." in text  # one rare label is 0.1 worse


def test_exact_ties_and_differences_below_the_last_digit_are_said_to_be_the_same(
    predicted: Callable[..., xr.Dataset], combine: Combine
) -> None:
    target = np.repeat([0.5, 1.5], 30)

    def text(second: float) -> str:
        one = predicted(target, target + 0.25)
        return headline(combine({("a", 0): one, ("b", 0): predicted(target, target + second)}))

    tie = text(0.25)
    assert tie.startswith("Nobody wins beyond noise: a has the least bMAE, 0.250 years, exactly the same as b (95 %")
    assert "interval: 0.000 to 0.000)." in tie
    assert ": the same as b when rounded, or 0 % (" in text(0.2500625)


def test_a_baseline_without_a_seed_of_the_winner_leaves_the_next_best_to_be_compared_with(
    predicted: Callable[..., xr.Dataset], combine: Combine
) -> None:
    target = np.repeat([0.5, 1.5], 30)
    wobble = 0.01 * np.tile([1.0, -1.0], 30)
    runs = {("base", 0): predicted(target, target + 0.9 + wobble)}
    for seed in (1, 2):
        runs |= {("good", seed): predicted(target, target + 0.3 + wobble)}
        runs |= {("next", seed): predicted(target, target + 0.5 - wobble)}
    text = headline(combine(runs))
    assert text.startswith(
        "good has the least bMAE, 0.300 years; whether it is better than base beyond noise is not known"
    )
    assert "It also differs" not in text
    assert "It differs from the next best, next, beyond noise (0.200 less; 95 % interval: 0." in text


def test_classes_are_compared_by_their_balanced_error(class_run: Callable[..., xr.Dataset], combine: Combine) -> None:
    few = combine({("softmax", 0): class_run([4, 2, 0]), ("adjusted", 0): class_run([3, 2, 1])}, label_units="1")
    assert headline(few).startswith(
        "Nobody wins beyond noise: adjusted has the least balanced error, 36.1 %, 8.3 points less"
    )
