from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from sklearn.metrics import log_loss

from dir_toolkit.errors import LabelError, ShapeError
from dir_toolkit.metrics.reliability import CalibrationMetrics, calibration_metrics

NAMES = ("ece", "classwise_ece", "log_loss", "brier", "count")


def samples(n: int = 200, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    probabilities = (2 * torch.randn(n, 4, generator=generator, dtype=torch.float64)).softmax(1)
    target = torch.randint(0, 4, (n,), generator=generator)
    return probabilities, target, torch.randint(0, 4, (n,), generator=generator)


def bin_of(p: float, num_bins: int) -> int:
    return next((m for m in range(num_bins) if m / num_bins < p <= (m + 1) / num_bins), 0)


def naive(
    probabilities: torch.Tensor, target: torch.Tensor, num_bins: int = 15, weight: torch.Tensor | None = None
) -> dict[str, float]:
    """Every number in plain Python, bin by bin and class by class."""
    rows, labels = probabilities.double().tolist(), target.tolist()
    weights = [1.0] * len(rows) if weight is None else weight.double().tolist()
    total, num_classes = math.fsum(weights), len(rows[0])

    def error(pairs: list[tuple[float, bool]]) -> float:
        outcome = 0.0
        for m in range(num_bins):
            inside = [(w, p, hit) for w, (p, hit) in zip(weights, pairs, strict=True) if bin_of(p, num_bins) == m]
            size = math.fsum(w for w, _, _ in inside)
            if size:
                accuracy = math.fsum(w for w, _, hit in inside if hit) / size
                confidence = math.fsum(w * p for w, p, _ in inside) / size
                outcome += size / total * abs(accuracy - confidence)
        return outcome

    both = list(zip(rows, labels, strict=True))
    each = [error([(p[c], t == c) for p, t in both]) for c in range(num_classes)]
    squares = [sum((q - (t == c)) ** 2 for c, q in enumerate(p)) for p, t in both]
    return {
        "ece": error([(max(p), p.index(max(p)) == t) for p, t in both]),
        "classwise_ece": sum(each) / num_classes,
        "log_loss": math.fsum(-w * math.log(p[t]) for w, (p, t) in zip(weights, both, strict=True)) / total,
        "brier": math.fsum(w * s for w, s in zip(weights, squares, strict=True)) / total,
        "count": total,
    }


def assert_equals_naive(result: xr.Dataset, expected: dict[str, float]) -> None:
    for name, value in expected.items():
        np.testing.assert_allclose(result[name].item(), value, rtol=1e-12, atol=1e-13, err_msg=name)


def assert_same(a: CalibrationMetrics, b: CalibrationMetrics) -> None:
    torch.testing.assert_close(a.histograms, b.histograms, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.totals, b.totals, rtol=1e-12, atol=1e-12)
    xr.testing.assert_allclose(a.compute(), b.compute(), rtol=1e-12)


def metrics_of(*batch: torch.Tensor, num_bins: int = 15) -> CalibrationMetrics:
    metrics = CalibrationMetrics(batch[0].shape[1], num_bins=num_bins)
    metrics.update(*batch)
    return metrics


def test_values_are_those_worked_out_by_hand() -> None:
    probabilities = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.5, 0.5]])
    result = calibration_metrics(probabilities, torch.tensor([0, 1, 0]), num_bins=5)
    assert result.ece.item() == pytest.approx((2 * abs(0.5 - 0.75) + abs(1 - 0.5)) / 3)
    # Class 0 as above; class 1: one of two at 0.25, none of one at 0.5.
    assert result.classwise_ece.item() == pytest.approx((1 / 3 + (2 * abs(0.5 - 0.25) + abs(0 - 0.5)) / 3) / 2)
    assert result.log_loss.item() == pytest.approx(-(math.log(0.75) + math.log(0.25) + math.log(0.5)) / 3)
    assert result.brier.item() == pytest.approx((2 * 0.0625 + 2 * 0.5625 + 2 * 0.25) / 3)
    assert result["count"].item() == 3
    assert set(result.data_vars) == set(NAMES)
    assert {result[name].attrs["units"] for name in NAMES} == {"1"}


@pytest.mark.parametrize("num_bins", [1, 2, 7, 15, 100])
@pytest.mark.parametrize("n", [1, 2, 200])
def test_everything_equals_a_naive_loop(n: int, num_bins: int) -> None:
    probabilities, target, weight = samples(n, seed=n)
    result = calibration_metrics(probabilities, target, num_bins=num_bins)
    assert_equals_naive(result, naive(probabilities, target, num_bins))
    weight = weight + 0.5
    result = calibration_metrics(probabilities, target, num_bins=num_bins, weight=weight)
    assert_equals_naive(result, naive(probabilities, target, num_bins, weight))


def test_scikit_learn_agrees_on_log_loss() -> None:
    probabilities, target, weight = samples()
    expected = log_loss(target.numpy(), probabilities.numpy(), labels=range(4))
    assert calibration_metrics(probabilities, target).log_loss.item() == pytest.approx(expected, rel=1e-12)
    expected = log_loss(target.numpy(), probabilities.numpy(), labels=range(4), sample_weight=weight.numpy())
    outcome = calibration_metrics(probabilities, target, weight=weight)
    assert outcome.log_loss.item() == pytest.approx(expected, rel=1e-12)


def test_the_comparisons_notice_a_wrong_answer() -> None:
    batch = samples()
    result = calibration_metrics(*batch[:2])
    for name in NAMES:
        wrong = naive(*batch[:2])
        wrong[name] += 1e-6
        with pytest.raises(AssertionError, match=name):
            assert_equals_naive(result, wrong)
    other = metrics_of(*batch[:2])
    other.histograms[1, 2, 3] += 1e-6
    with pytest.raises(AssertionError):
        assert_same(metrics_of(*batch[:2]), other)


def test_confidences_on_an_edge_belong_below_it_and_zero_to_the_first_bin() -> None:
    for num_bins in (1, 3, 10, 15, 100):
        edges = [m / num_bins for m in range(num_bins + 1)]
        for dtype in (torch.float32, torch.float64):
            p = torch.tensor([[e, 1 - e] for e in edges], dtype=dtype)
            metrics = metrics_of(p, torch.zeros(len(p), dtype=torch.int64), num_bins=num_bins)
            expected = np.bincount([0, *range(num_bins)], minlength=num_bins)
            np.testing.assert_array_equal(metrics.reliability(0)["count"], expected)
    certain = metrics_of(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([1, 0]))
    assert certain.reliability()["count"].values.tolist() == [0] * 14 + [2]
    assert certain.reliability(1)["count"].values.tolist() == [1] + [0] * 13 + [1]
    assert [certain.compute()[name].item() for name in NAMES] == [0, 0, 0, 0, 2]


def test_a_perfectly_calibrated_source_has_a_small_error_and_a_sharpened_one_has_not() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 1.5 * torch.randn(40_000, 3, generator=generator, dtype=torch.float64)
    target = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    honest, sharp = (calibration_metrics((k * logits).softmax(1), target) for k in (1, 2))
    assert honest.ece.item() < 0.01 < 0.1 < sharp.ece.item()
    assert honest.classwise_ece.item() < 0.01 < 0.05 < sharp.classwise_ece.item()
    assert honest.log_loss.item() < sharp.log_loss.item()
    assert honest.brier.item() < sharp.brier.item()


def test_weight_two_is_seen_twice_and_weight_zero_is_absent() -> None:
    probabilities, target, weight = samples()
    repeated = metrics_of(probabilities.repeat_interleave(weight, 0), target.repeat_interleave(weight))
    assert_same(metrics_of(probabilities, target, weight), repeated)
    xr.testing.assert_allclose(metrics_of(probabilities, target, weight).reliability(), repeated.reliability())
    assert_same(metrics_of(probabilities, target, torch.ones(200)), metrics_of(probabilities, target))
    nothing = calibration_metrics(probabilities, target, weight=torch.zeros(200))
    assert nothing["count"].item() == 0
    assert all(math.isnan(nothing[name].item()) for name in NAMES[:-1])


def test_weights_make_all_classes_alike() -> None:
    probabilities, target, _ = samples()
    counts = target.bincount(minlength=4)
    balanced = calibration_metrics(probabilities, target, weight=1 / counts[target].double())
    each = [calibration_metrics(probabilities[target == c], target[target == c]) for c in range(4)]
    for name in ("log_loss", "brier"):
        assert balanced[name].item() == pytest.approx(sum(part[name].item() for part in each) / 4, rel=1e-12)


def test_the_reliability_diagram_holds_means_by_bin() -> None:
    probabilities = torch.tensor([[0.75, 0.25], [0.875, 0.125], [0.5, 0.5]], dtype=torch.float64)
    metrics = metrics_of(probabilities, torch.tensor([0, 1, 1]), num_bins=4)
    diagram = metrics.reliability()
    assert diagram.sizes == {"confidence_bin": 4}
    assert diagram.confidence_low.values.tolist() == [0, 0.25, 0.5, 0.75]
    assert diagram.confidence_high.values.tolist() == [0.25, 0.5, 0.75, 1]
    np.testing.assert_allclose(diagram["count"], [0, 1, 1, 1])
    np.testing.assert_allclose(diagram.confidence, [np.nan, 0.5, 0.75, 0.875])
    np.testing.assert_allclose(diagram.accuracy, [np.nan, 0, 1, 0])
    second = metrics.reliability(1)
    np.testing.assert_allclose(second["count"], [2, 1, 0, 0])
    np.testing.assert_allclose(second.confidence, [0.1875, 0.5, np.nan, np.nan])
    np.testing.assert_allclose(second.accuracy, [0.5, 1, np.nan, np.nan])
    assert {diagram[name].attrs["units"] for name in ("confidence", "accuracy", "count", "confidence_low")} == {"1"}
    metrics.update(probabilities, torch.tensor([0, 1, 1]))
    np.testing.assert_allclose(diagram["count"], [0, 1, 1, 1])  # what was handed out does not change
    for index, kind in ((-1, ValueError), (2, ValueError), (0.0, TypeError)):
        with pytest.raises(kind, match=r"^CalibrationMetrics\.reliability: class_index must be"):
            metrics.reliability(index)  # type: ignore[arg-type]


def test_the_error_follows_from_the_diagrams() -> None:
    metrics = metrics_of(*samples())
    gaps = []
    for index in (None, 0, 1, 2, 3):
        diagram = metrics.reliability(index)
        share = diagram["count"] / diagram["count"].sum()
        gaps.append(float((share * abs(diagram.accuracy - diagram.confidence)).sum()))
    result = metrics.compute()
    assert result.ece.item() == pytest.approx(gaps[0], rel=1e-12)
    assert result.classwise_ece.item() == pytest.approx(sum(gaps[1:]) / 4, rel=1e-12)


def test_a_probability_of_zero_costs_much_but_not_everything() -> None:
    result = calibration_metrics(torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([1]))
    assert result.log_loss.item() == pytest.approx(-math.log(torch.finfo(torch.float32).tiny))
    assert result.ece.item() == 1
    assert result.brier.item() == 2


def test_nothing_seen_is_missing_not_zero() -> None:
    metrics = CalibrationMetrics(3)
    metrics.update(torch.empty(0, 3), torch.empty(0, dtype=torch.int64), torch.empty(0))
    result = metrics.compute()
    assert all(math.isnan(result[name].item()) for name in NAMES[:-1])
    assert result["count"].item() == 0
    assert metrics.reliability().accuracy.isnull().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
def test_sums_are_float64_whatever_comes_and_inputs_are_left_alone(dtype: torch.dtype) -> None:
    probabilities = torch.tensor([[1.0, 0.0], [1.0, 0.0]] if dtype == torch.int64 else [[0.75, 0.25], [0.5, 0.5]])
    given = probabilities.to(dtype)
    before = given.clone()
    target = torch.tensor([0, 1], dtype=torch.uint8)
    metrics = metrics_of(given.requires_grad_() if given.is_floating_point() else given, target, num_bins=4)
    assert metrics.histograms.dtype == metrics.totals.dtype == torch.float64
    assert not metrics.histograms.requires_grad
    assert not metrics.totals.requires_grad
    assert_same(metrics, metrics_of(probabilities.double(), target, num_bins=4))
    assert torch.equal(given, before)
    assert target.tolist() == [0, 1]


def test_half_precision_meets_the_edges_in_its_own_precision() -> None:
    # 0.2 and 0.8 are edges of five bins; rounded to half precision they lie beside those in float64.
    p = torch.tensor([[0.2, 0.8]], dtype=torch.float16)
    metrics = metrics_of(p, torch.tensor([0]), num_bins=5)
    assert metrics.reliability(0)["count"].values.tolist() == [1, 0, 0, 0, 0]
    assert metrics.reliability(1)["count"].values.tolist() == [0, 0, 0, 1, 0]


GOOD = [[0.5, 0.5], [1.0, 0.0]]
BAD = [
    (
        [[0.5, 0.5], [math.nan, 1.0]],
        [0, 1],
        None,
        ValueError,
        r"probabilities must be finite, got nan at index \[1, 0\]",
    ),
    ([[0.5, math.inf], [0.5, 0.5]], [0, 1], None, ValueError, r"probabilities must be finite, got inf at index \[0, 1"),
    (
        [[0.5, 0.5], [1.5, -0.5]],
        [0, 1],
        None,
        ValueError,
        r"probabilities must lie in \[0, 1\], got 1\.5 at index \[1, 0",
    ),
    (
        [[0.5, 0.5], [0.4, 0.5]],
        [0, 1],
        None,
        ValueError,
        r"each row of .* sum to one, got 0\.9 at index \[1\] \(1 such values\)",
    ),
    (GOOD, [0, 2], None, LabelError, r"target must lie on the label axis 0 to 1, got 2 at index \[1\] \(1 such"),
    (GOOD, [-1, 0], None, LabelError, "target must lie on the label axis 0 to 1, got -1 at .* Count classes fr"),
    (GOOD, [0, 1], [1.0, -1.0], ValueError, "weight must not be negative, got a minimum of -1"),
    (GOOD, [0, 1], [1.0, math.nan], ValueError, r"weight must be finite, got nan at index \[1\]"),
    (GOOD, [0, 1], [math.inf, 1.0], ValueError, r"weight must be finite, got inf at index \[0\]"),
]


@pytest.mark.parametrize(
    ("probabilities", "target", "weight", "kind", "message"),
    [
        *BAD,
        (GOOD, [0.0, 0.5], None, LabelError, "target must be whole numbers where bins are classes, got 0.5"),
        (GOOD, [0.0, math.nan], None, LabelError, "target must not be NaN"),
        ([[True, False]], [0], None, TypeError, "probabilities must be integers or floats"),
        ([[0.5, 0.5]], [0, 1], None, ShapeError, r"target must be \(1,\), one per row of prob.*, got shape \(2,\)"),
        ([[0.2, 0.3, 0.5]], [0], None, ShapeError, r"probabilities must be \(N, 2\), got shape \(1, 3\)"),
        ([0.5, 0.5], [0, 1], None, ShapeError, r"probabilities must be \(N, 2\), got shape \(2,\)"),
        (GOOD, [[0], [1]], None, ShapeError, r"target must be \(2,\), .* got shape \(2, 1\)\. Use target\.sq"),
        (GOOD, [0, 1], [1.0], ShapeError, r"weight must be \(2,\), one per row of prob.*, got shape \(1,\)"),
        (GOOD, [0, 1], [True, True], TypeError, "weight must be integers or floats"),
    ],
)
def test_what_is_refused_adds_nothing(
    probabilities: Any, target: Any, weight: Any, kind: type[Exception], message: str
) -> None:
    metrics = CalibrationMetrics(2)
    metrics.update(torch.tensor(GOOD), torch.tensor([0, 1]))
    before = metrics.histograms.clone(), metrics.totals.clone()
    with pytest.raises(kind, match=rf"^CalibrationMetrics\.update: {message}"):
        metrics.update(
            torch.tensor(probabilities), torch.tensor(target), None if weight is None else torch.tensor(weight)
        )
    assert torch.equal(metrics.histograms, before[0])
    assert torch.equal(metrics.totals, before[1])


@pytest.mark.parametrize(("probabilities", "target", "weight"), [row[:3] for row in BAD])
def test_what_cannot_be_looked_at_makes_the_results_nan(
    probabilities: Any, target: Any, weight: Any, unread: None
) -> None:
    metrics = CalibrationMetrics(2)
    metrics.update(torch.tensor(GOOD), torch.tensor([0, 1]))
    assert not any(math.isnan(metrics.compute()[name].item()) for name in NAMES)
    metrics.update(torch.tensor(probabilities), torch.tensor(target), None if weight is None else torch.tensor(weight))
    assert all(math.isnan(metrics.compute()[name].item()) for name in NAMES)


def test_weights_whose_sums_would_overflow_are_refused_and_add_nothing() -> None:
    p, target = torch.tensor([[0.75, 0.25], [0.0, 1.0]]), torch.tensor([0, 0])
    metrics = CalibrationMetrics(2)
    metrics.update(p, target, torch.tensor([5e299, 4e299], dtype=torch.float64))
    expected = calibration_metrics(p, target, weight=torch.tensor([5.0, 4.0]))
    before = metrics.compute()
    for name in ("ece", "classwise_ece", "log_loss", "brier"):
        assert before[name].item() == pytest.approx(expected[name].item(), rel=1e-12)
    rule = r"^CalibrationMetrics.update: the sum of all weights must be below 1e\+300, got {}\. Scale the"
    for weight, total in ((1e299, r"1\.1e\+300"), (1e308, "inf")):
        with pytest.raises(ValueError, match=rule.format(total)):
            metrics.update(p, target, torch.full((2,), weight, dtype=torch.float64))
        xr.testing.assert_identical(metrics.compute(), before)


def test_rows_may_be_off_by_rounding() -> None:
    result = calibration_metrics(torch.tensor([[1.0005, 0.0], [0.4996, 0.4996]]), torch.tensor([0, 0]))
    assert result["count"].item() == 2
    assert result.ece.item() == pytest.approx((0.0005 + 0.5004) / 2, abs=1e-6)


def test_arguments_are_checked() -> None:
    for value, kind in ((0, ValueError), (-1, ValueError), (2.0, TypeError), (None, TypeError), (True, TypeError)):
        with pytest.raises(kind, match=r"^CalibrationMetrics: num_classes must be"):
            CalibrationMetrics(value)  # type: ignore[arg-type]
        with pytest.raises(kind, match=r"^CalibrationMetrics: num_bins must be"):
            CalibrationMetrics(2, num_bins=value)  # type: ignore[arg-type]
    for value in (None, [0.5, 0.5], "abc"):
        with pytest.raises(TypeError, match=r"^CalibrationMetrics\.update: probabilities must be a torch\.Tensor"):
            CalibrationMetrics(2).update(value, torch.tensor([0]))  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"^calibration_metrics: target must be a torch\.Tensor"):
            calibration_metrics(torch.tensor(GOOD), value)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"merge: other must be a CalibrationMetrics, got"):
            CalibrationMetrics(2).merge(value)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^CalibrationMetrics\.update: weight must be a torch\.Tensor"):
        CalibrationMetrics(2).update(torch.tensor(GOOD), torch.tensor([0, 1]), [1, 1])  # type: ignore[arg-type]
    for empty in (torch.empty(0, 2), torch.empty(3, 0), torch.ones(2)):
        with pytest.raises(
            ShapeError, match=r"^calibration_metrics: probabilities must (hold at least one value|be \(N, C\))"
        ):
            calibration_metrics(empty, torch.zeros(len(empty), dtype=torch.int64))
    for other, got in (
        (CalibrationMetrics(3), "num_classes=2 and num_classes=3"),
        (CalibrationMetrics(2, num_bins=10), "num_bins=15 and num_bins=10"),
        (CalibrationMetrics(2, outside="clip"), "outside='raise' and outside='clip'"),
    ):
        with pytest.raises(ValueError, match=f"merge: both must have the same settings, got {got}"):
            CalibrationMetrics(2).merge(other)
    fresh = metrics_of(torch.tensor(GOOD), torch.tensor([0, 1]), num_bins=7).fresh()
    assert (fresh.num_classes, fresh.num_bins, fresh.totals.sum().item()) == (2, 7, 0)
