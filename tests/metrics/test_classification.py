from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, precision_score, recall_score

from dir_toolkit import Bins, LabelDensity
from dir_toolkit.errors import LabelError, ShapeError
from dir_toolkit.metrics.classification import ClassificationMetrics, balanced_error, classification_metrics

BINS = Bins.classes(6)
DENSITY = LabelDensity(BINS, [500, 101, 100, 19, 3, 0])
REGION_OF_BIN = ["many", "many", "medium", "few", "few", "unseen"]
REGIONS = ("all", "many", "medium", "few", "unseen")


def samples(n: int = 300, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and classes; class 4 is never tested."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.tensor([0, 0, 0, 1, 1, 2, 3, 5])[torch.randint(0, 8, (n,), generator=generator)]
    scores = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    scores[torch.arange(n), target] += 1.5
    return scores, target


def naive(pred: torch.Tensor, target: torch.Tensor) -> dict[str, dict[str, float]]:
    """Every number in plain Python, region by region and class by class, from class indices."""
    pairs = list(zip(pred.tolist(), target.tolist(), strict=True))
    outcome: dict[str, dict[str, float]] = {}
    for region in REGIONS:
        classes = [c for c in range(6) if region in ("all", REGION_OF_BIN[c]) and any(t == c for _, t in pairs)]
        inside = [(p, t) for p, t in pairs if t in classes]
        row = dict.fromkeys(("error", "balanced_error", "macro_f1"), math.nan)
        if inside:
            row["error"] = sum(p != t for p, t in inside) / len(inside)
            misses, f1 = [], []
            for c in classes:
                mine = [p for p, t in inside if t == c]
                misses.append(sum(p != c for p in mine) / len(mine))
                hits, claims = sum(p == c for p in mine), sum(p == c for p, _ in pairs)
                precision, recall = hits / claims if claims else 0.0, hits / len(mine)
                f1.append(2 * precision * recall / (precision + recall) if hits else 0.0)
            row["balanced_error"], row["macro_f1"] = sum(misses) / len(misses), sum(f1) / len(f1)
        outcome[region] = row | {"count": len(inside), "bins": len(classes)}
    return outcome


def assert_equals_naive(result: xr.Dataset, expected: dict[str, dict[str, float]]) -> None:
    for region, row in expected.items():
        for name, value in row.items():
            given = result[name].sel(region=region).item()
            np.testing.assert_allclose(given, value, rtol=1e-12, atol=1e-13, err_msg=f"{name} of {region}")


def of(pred: Any, target: Any, **options: Any) -> xr.Dataset:
    return classification_metrics(torch.as_tensor(pred), torch.as_tensor(target), DENSITY, **options)


def menon() -> tuple[torch.Tensor, torch.Tensor]:
    """10, 20 and 30 instances, of which 1, 10 and 20 are right."""
    target = torch.arange(3).repeat_interleave(torch.tensor([10, 20, 30]))
    right = torch.cat([torch.arange(n) < k for n, k in ((10, 1), (20, 10), (30, 20))])
    return torch.where(right, target, (target + 1) % 3), target


def test_the_example_of_the_paper_gives_its_numbers() -> None:
    pred, target = menon()
    expected = (9 / 10 + 10 / 20 + 10 / 30) / 3
    assert balanced_error(pred, target, 3) == pytest.approx(expected, rel=1e-12)
    assert expected == pytest.approx(0.5778, abs=5e-5)
    bins = Bins.classes(3)
    result = classification_metrics(pred, target, LabelDensity(bins, [10, 20, 30])).sel(region="all")
    assert result.balanced_error.item() == pytest.approx(expected, rel=1e-12)
    assert result.error.item() == pytest.approx(29 / 60, rel=1e-12)


def test_values_are_those_worked_out_by_hand() -> None:
    result = of([0, 0, 1, 2, 0], [0, 0, 0, 2, 3])
    assert result.error.values.tolist()[:4] == pytest.approx([2 / 5, 1 / 3, 0, 1])
    assert result.balanced_error.values.tolist()[:4] == pytest.approx([(1 / 3 + 0 + 1) / 3, 1 / 3, 0, 1])
    # Class 0: two hits of three, three claims; class 2: all; class 3: never predicted.
    assert result.macro_f1.values.tolist()[:4] == pytest.approx([(2 / 3 + 1 + 0) / 3, 2 / 3, 1, 0])
    assert result["count"].values.tolist() == [5, 3, 1, 1, 0]
    assert result.bins.values.tolist() == [3, 1, 1, 1, 0]
    np.testing.assert_allclose(result.bin_recall, [2 / 3, np.nan, 1, 0, np.nan, np.nan])
    np.testing.assert_allclose(result.bin_precision, [2 / 3, 0, 1, np.nan, np.nan, np.nan])
    assert result.bin_count.values.tolist() == [3, 0, 1, 1, 0, 0]
    assert result.train_count.values.tolist() == [500, 101, 100, 19, 3, 0]
    assert result.bin_region.values.tolist() == REGION_OF_BIN


@pytest.mark.parametrize("n", [1, 2, 7, 300])
def test_everything_equals_a_naive_loop(n: int) -> None:
    scores, target = samples(n)
    assert_equals_naive(of(scores, target), naive(scores.argmax(1), target))
    assert_equals_naive(of(scores.argmax(1), target.double()), naive(scores.argmax(1), target))
    expected = naive(scores.argmax(1), target)["all"]["balanced_error"]
    assert balanced_error(scores, target, 6) == pytest.approx(expected, rel=1e-12)
    assert balanced_error(scores.argmax(1).int(), target.to(torch.uint8), 6) == pytest.approx(expected, rel=1e-12)


def test_scikit_learn_agrees() -> None:
    scores, target = samples()
    pred, true = scores.argmax(1).numpy(), target.numpy()
    result = of(scores, target)
    everything = result.sel(region="all")
    assert everything.error.item() == pytest.approx(1 - accuracy_score(true, pred), rel=1e-12)
    # Scikit-learn warns that class 4 is predicted and never true.
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        balanced = balanced_accuracy_score(true, pred)
    assert everything.balanced_error.item() == pytest.approx(1 - balanced, rel=1e-12)
    assert balanced_error(scores, target, 6) == pytest.approx(1 - balanced, rel=1e-12)
    for region, tested in (("all", [0, 1, 2, 3, 5]), ("many", [0, 1]), ("few", [3])):
        f1 = f1_score(true, pred, labels=tested, average="macro")
        assert result.macro_f1.sel(region=region).item() == pytest.approx(f1, rel=1e-12)
    recall = recall_score(true, pred, labels=range(6), average=None, zero_division=np.nan)
    np.testing.assert_allclose(result.bin_recall, recall, rtol=1e-12)
    precision = precision_score(true, pred, labels=range(6), average=None, zero_division=np.nan)
    np.testing.assert_allclose(result.bin_precision, precision, rtol=1e-12)


def test_the_comparison_notices_a_wrong_answer() -> None:
    scores, target = samples()
    result = of(scores, target)
    for name in ("error", "balanced_error", "macro_f1", "count", "bins"):
        wrong = naive(scores.argmax(1), target)
        wrong["few"][name] += 1e-6
        with pytest.raises(AssertionError, match=f"{name} of few"):
            assert_equals_naive(result, wrong)


def test_the_confusion_matrix_counts_target_by_prediction() -> None:
    metrics = ClassificationMetrics(DENSITY)
    metrics.update(torch.tensor([0, 1, 1, 5]), torch.tensor([0, 0, 0, 2]))
    matrix = metrics.confusion_matrix()
    assert matrix.dims == ("target", "pred")
    assert matrix.dtype == np.int64
    assert matrix.attrs["units"] == "1"
    assert [matrix.sel(target=0, pred=p).item() for p in range(6)] == [1, 2, 0, 0, 0, 0]
    assert matrix.sel(target=2, pred=5).item() == 1
    assert matrix.sum().item() == 4
    metrics.update(torch.tensor([0]), torch.tensor([0]))
    assert matrix.sum().item() == 4  # what was handed out does not change


def test_equal_scores_go_to_the_lowest_index_and_infinite_ones_count() -> None:
    metrics = ClassificationMetrics(DENSITY)
    scores = torch.zeros(3, 6)
    scores[1] = -math.inf
    scores[2, 4] = math.inf
    metrics.update(scores, torch.tensor([0, 0, 4]))
    assert metrics.confusion.diagonal().tolist() == [2, 0, 0, 0, 1, 0]


def test_continuous_labels_fall_into_bins() -> None:
    bins = Bins.uniform(0, 6, width=2)
    result = classification_metrics(
        torch.tensor([0, 1, 1, 2]), torch.tensor([0.5, 1.9, 2.0, 6.0]), LabelDensity(bins, [200, 50, 1])
    )
    assert result.error.values.tolist()[:4] == [0.25, 0.5, 0, 0]
    assert result.bin_count.values.tolist() == [2, 1, 1]
    with pytest.raises(
        LabelError, match=r"classification_metrics: target must lie on the label axis \[0, 6\], got 6\.5 at index \[0\]"
    ):
        classification_metrics(torch.tensor([0]), torch.tensor([6.5]), LabelDensity(bins, [1, 1, 1]))


def test_a_region_without_a_test_sample_is_missing_not_zero() -> None:
    result = of([0, 1], [0, 1])
    for region in ("medium", "few", "unseen"):
        row = result.sel(region=region)
        assert all(math.isnan(row[name].item()) for name in ("error", "balanced_error", "macro_f1"))
        assert row["count"].item() == row.bins.item() == 0
    empty = ClassificationMetrics(DENSITY)
    empty.update(torch.empty(0, 6), torch.empty(0, dtype=torch.int64))
    empty.update(torch.empty(0, dtype=torch.int64), torch.empty(0))
    for name in ("error", "balanced_error", "macro_f1", "bin_recall", "bin_precision"):
        assert empty.compute()[name].isnull().all()
    assert all(math.isnan(value) for value in empty.summary().values())


def test_the_summary_holds_what_selects_an_epoch() -> None:
    metrics = ClassificationMetrics(DENSITY)
    metrics.update(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 1, 2]))
    summary = metrics.summary()
    assert list(summary) == [*(f"balanced_error/{r}" for r in ("all", "many", "medium", "few")), "error/all"]
    assert list(summary.values())[:3] == pytest.approx([1 / 6, 1 / 4, 0])
    assert summary["error/all"] == 1 / 4
    assert math.isnan(summary["balanced_error/few"])
    assert metrics.selects in summary
    fresh = metrics.fresh()
    assert fresh.confusion.sum() == 0
    assert metrics.confusion.sum() == 4
    xr.testing.assert_identical(fresh.compute(), ClassificationMetrics(DENSITY).compute())


def test_regions_can_be_given() -> None:
    scores, target = samples()
    given = ["few", "many", "many", "medium", "unseen", "few"]
    metrics = ClassificationMetrics(DENSITY, regions=given)
    metrics.update(scores, target)
    result = metrics.compute()
    assert result.bin_region.values.tolist() == given
    assert result["count"].sel(region="few").item() == int(((target == 0) | (target == 5)).sum())
    xr.testing.assert_identical(of(scores, target, regions=np.array(given)), result)
    xr.testing.assert_identical(metrics.compute(many=1, few=1), result)
    assert metrics.fresh().compute().bin_region.values.tolist() == given
    given[0] = "many"
    assert metrics.compute().bin_region.values.tolist()[0] == "few"
    with pytest.raises(ValueError, match=r"merge: both must have the same settings, got "):
        metrics.merge(ClassificationMetrics(DENSITY))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int32])
def test_scores_may_have_any_precision_and_are_left_alone(dtype: torch.dtype) -> None:
    scores = torch.tensor([[0, 3, 1], [2, 0, 0]]).to(dtype)
    before = scores.clone()
    bins = Bins.classes(3)
    metrics = ClassificationMetrics(LabelDensity(bins, [1, 1, 1]))
    metrics.update(scores.requires_grad_() if scores.is_floating_point() else scores, torch.tensor([1.0, 2.0]))
    assert metrics.confusion.dtype == torch.int64
    assert metrics.confusion.tolist() == [[0, 0, 0], [0, 1, 0], [1, 0, 0]]
    assert torch.equal(scores, before)


NAN_ROW = [[0.0] * 6, [0.0, math.nan, 0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("pred", "target", "kind", "message"),
    [
        (NAN_ROW, [0, 0], ValueError, r"pred must not be NaN, got nan at index \[1, 1\] \(1 such values\)\. Remove or"),
        (
            [0, 6],
            [0, 1],
            LabelError,
            r"pred must hold class indices from 0 to 5, got 6 at index \[1\] \(1 such values\)\.",
        ),
        ([-1, -2], [0, 1], LabelError, r"pred must hold class indices from 0 to 5, got -1 at index \[0\] \(2 such"),
        ([0, 1], [0, 6], LabelError, r"target must .* 0 to 5, got 6 at index \[1\]"),
        ([0.0, 1.0], [0, 1], TypeError, r"pred must be integers, got dtype torch\.float32\. Use pred\.long\(\)"),
        ([True, False], [0, 1], TypeError, "pred must be integers or floats"),
        ([0, 1], [0j, 1j], TypeError, "target must be integers or floats"),
        ([0, 1, 2], [0, 1], ShapeError, r"pred must be indices \(2,\) or scores \(2, 6\), got shape \(3,\)"),
        ([0, 1], [[0], [1]], ShapeError, r"target must be \(N,\), got shape \(2, 1\)\. Use target\.squeeze\(1\)"),
        ([[0.0] * 5] * 2, [0, 1], ShapeError, r"pred must be indices \(2,\) or scores \(2, 6\), got shape \(2, 5\)"),
        ([[0.0] * 6], [0, 1], ShapeError, r"pred must be indices \(2,\) or scores \(2, 6\), got shape \(1, 6\)"),
        ([[[0.0] * 6]], [0], ShapeError, r"pred must be indices \(1,\) or scores \(1, 6\), got shape \(1, 1, 6\)"),
    ],
)
def test_what_is_refused_adds_nothing(pred: Any, target: Any, kind: type[Exception], message: str) -> None:
    metrics = ClassificationMetrics(DENSITY)
    metrics.update(*samples())
    before = metrics.confusion.clone()
    with pytest.raises(kind, match=rf"^ClassificationMetrics\.update: {message}"):
        metrics.update(torch.tensor(pred), torch.tensor(target))
    assert torch.equal(metrics.confusion, before)
    with pytest.raises(kind, match=rf"^balanced_error: {message}"):
        balanced_error(torch.tensor(pred), torch.tensor(target), 6)


@pytest.mark.parametrize("label", [math.nan, 0.5, 6.0, -1.0, math.inf])
def test_labels_that_are_no_class_are_refused(label: float) -> None:
    metrics = ClassificationMetrics(DENSITY)
    with pytest.raises(LabelError, match=r"^ClassificationMetrics\.update: target must"):
        metrics.update(torch.tensor([0, 1]), torch.tensor([0.0, label]))
    assert metrics.confusion.sum() == 0
    with pytest.raises(TypeError, match=r"^balanced_error: target must be integers, .* Use target\.long\(\)"):
        balanced_error(torch.tensor([0, 1]), torch.tensor([0.0, label]), 6)


def test_arrays_columns_and_lists_are_taken_as_tensors_are() -> None:
    scores, target = samples()
    pred = scores.argmax(1)
    expected, error = classification_metrics(scores, target, DENSITY), balanced_error(scores, target, 6)
    for kind in (np.asarray, torch.Tensor.tolist, lambda values: pd.Series(values.numpy())):
        assert classification_metrics(kind(pred), kind(target), DENSITY).equals(expected)
        assert balanced_error(kind(pred), kind(target), 6) == error
    assert classification_metrics(scores.numpy(), target.tolist(), DENSITY).equals(expected)
    assert balanced_error(scores.tolist(), target.numpy(), 6) == error


def test_arguments_are_checked() -> None:
    where = r"^ClassificationMetrics: "
    for value in (None, "abc", ["a", "b"], np.array(["a"])):
        with pytest.raises(ValueError, match=f"{where}density must be a LabelDensity over one axis, got"):
            ClassificationMetrics(value)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"^ClassificationMetrics\.update: pred must be integers or floats"):
            ClassificationMetrics(DENSITY).update(value, torch.ones(3))
        with pytest.raises(TypeError, match=r"^classification_metrics: target must be integers or floats"):
            classification_metrics(torch.ones(3), value, DENSITY)
        with pytest.raises(TypeError, match=r"^balanced_error: target must be integers or floats"):
            balanced_error(torch.ones(3), value, 2)
        with pytest.raises(TypeError, match=r"merge: other must be a ClassificationMetrics, got"):
            ClassificationMetrics(DENSITY).merge(value)  # type: ignore[arg-type]
    grid = Bins.grid(BINS, BINS)
    with pytest.raises(ValueError, match=f"{where}density must be a LabelDensity over one axis, got <LabelDensity"):
        ClassificationMetrics(LabelDensity(grid, [1] * 36))
    with pytest.raises(ValueError, match=f"{where}density must be counted, not smoothed"):
        ClassificationMetrics(LabelDensity(BINS, DENSITY.counts / 2))
    with pytest.raises(
        ShapeError, match=r"^classification_metrics: target must hold at least one value, got shape \(0,"
    ):
        of(torch.empty(0, 6), torch.empty(0))
    with pytest.raises(ShapeError, match=r"^balanced_error: target must hold at least one value, got shape \(0,"):
        balanced_error(torch.empty(0, 6), torch.empty(0, dtype=torch.int64), 6)
    for classes, kind in ((0, ValueError), (2.0, TypeError), (None, TypeError)):
        with pytest.raises(kind, match=r"^balanced_error: num_classes must be"):
            balanced_error(torch.tensor([0]), torch.tensor([0]), classes)  # type: ignore[arg-type]
    other = ClassificationMetrics(LabelDensity(BINS, [1] * 6))
    with pytest.raises(ValueError, match=r"merge: both must have the same settings, got "):
        ClassificationMetrics(DENSITY).merge(other)


@pytest.mark.parametrize(
    ("regions", "kind", "got"),
    [
        (["many"] * 5, ShapeError, "5 names"),
        (["many"] * 5 + ["head"], ValueError, r"'head' at index \[5\]"),
        ([0, 1, 2, 3, 4, 5], ValueError, r"0 at index \[0\]"),
        ("medium", TypeError, "'medium'"),
        (3, TypeError, "3"),
    ],
)
def test_region_names_are_checked(regions: Any, kind: type[Exception], got: str) -> None:
    with pytest.raises(kind, match=rf"^ClassificationMetrics: regions must be 6 names, .*'unseen', got {got}\."):
        ClassificationMetrics(DENSITY, regions=regions)


def test_the_summary_shows_the_regions_that_the_axis_has() -> None:
    metrics = ClassificationMetrics(DENSITY, regions=["few", "many", "many", "many", "many", "many"])
    assert [name for name in metrics.summary() if name.startswith("balanced")] == [
        "balanced_error/all",
        "balanced_error/many",
        "balanced_error/few",
    ]
