from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from dir_toolkit import Bins
from dir_toolkit.errors import ShapeError
from dir_toolkit.labels.decoding import bin_shares, decode, interval, quantiles
from dir_toolkit.labels.soft_labels import limits, soft_labels

AGES = Bins.uniform(0, 117, width=1, integer=True)
UNEVEN = Bins.from_edges([-3, -1, 0, 0.1, 4, 20])
CLASSES = Bins.classes(3)
LEVELS = [0.001, 0.05, 0.25, 0.5, 0.77, 0.999]
POINTS = ("expectation", "median", "mode")
each_axis = pytest.mark.parametrize("bins", [AGES, UNEVEN], ids=["ages", "uneven"])


def distributions(bins: Bins, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(*shape, len(bins), generator=generator, dtype=torch.float64)
    scores[torch.rand(scores.shape, generator=generator) < 0.3] = -torch.inf  # flat stretches
    scores[..., 1] = 0
    return scores.softmax(-1).to(dtype)


def naive(row: list[float], bins: Bins, q: float) -> float:
    """The smallest label at which the cumulative distribution, a line in each bin, reaches q."""
    ends = limits(bins, torch.zeros((), dtype=torch.float64)).tolist()
    reached = 0.0
    for b, p in enumerate(row):
        if reached + p >= q:
            return ends[b] + (ends[b + 1] - ends[b]) * (q - reached) / p
        reached += p
    return ends[-1]


def test_values_are_those_worked_out_by_hand() -> None:
    bins = Bins.from_edges([0, 10, 20, 50])
    p = torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.0, 1.0], [0.5, 0.0, 0.5], [1.0, 0.0, 0.0]])
    assert decode(p, bins).tolist() == pytest.approx([5 * 0.5 + 15 * 0.25 + 35 * 0.25, 35, 20, 5])
    assert decode(p, bins, "median").tolist() == [10, 35, 10, 5]  # on the flat stretch the smallest
    assert decode(p, bins, "mode").tolist() == [5, 35, 5, 5]
    assert quantiles(p, bins, [0.25, 0.75]).tolist() == [[5, 20], [27.5, 42.5], [5, 35], [2.5, 7.5]]
    lower, upper = interval(p, bins, 0.5)
    assert torch.equal(torch.stack([lower, upper], -1), quantiles(p, bins, [0.25, 0.75]))
    # Age 26 is all ages that round to it.
    certain = torch.nn.functional.one_hot(torch.tensor(26), 117).float()
    assert [decode(certain, AGES, point).item() for point in POINTS] == [26, 26, 26]  # type: ignore[arg-type]
    assert [end.item() for end in interval(certain, AGES, 0.9)] == pytest.approx([25.55, 26.45])


@each_axis
def test_quantiles_equal_a_naive_loop(bins: Bins) -> None:
    p = distributions(bins, 30)
    expected = torch.tensor([[naive(row, bins, q) for q in LEVELS] for row in p.tolist()], dtype=torch.float64)
    for levels in (LEVELS, np.array(LEVELS)):
        assert_close(quantiles(p, bins, levels), expected, rtol=1e-12, atol=1e-12)
    assert_close(quantiles(p, bins, torch.tensor(LEVELS, dtype=torch.float64)), expected, rtol=1e-12, atol=1e-12)
    assert_close(decode(p, bins, "median"), expected[:, 3], rtol=1e-12, atol=1e-12)
    assert torch.equal(decode(p, bins, "median"), quantiles(p, bins, 0.5)[:, 0])
    for level in (0.1, 0.9, 0.99):
        ends = torch.tensor(
            [[naive(r, bins, (1 + s * level) / 2) for s in (-1, 1)] for r in p.tolist()], dtype=torch.float64
        )
        assert_close(torch.stack(interval(p, bins, level), -1), ends, rtol=1e-12, atol=1e-12)


@each_axis
def test_the_cumulative_distribution_takes_quantiles_back_to_their_levels(bins: Bins) -> None:
    p = distributions(bins, 30)
    ends = limits(bins, p).numpy()
    for row, labels in zip(p.numpy(), quantiles(p, bins, LEVELS).numpy(), strict=True):
        back = np.interp(labels, ends, np.concatenate([[0], row.cumsum()]))
        np.testing.assert_allclose(back, LEVELS, atol=1e-12)


@each_axis
def test_expectation_is_that_of_the_axis_and_mode_the_most_probable_bin(bins: Bins) -> None:
    p = distributions(bins, 4, 5)
    assert_close(decode(p, bins), bins.expectation(p), rtol=1e-13, atol=1e-13)
    assert decode(p, bins, "mode").tolist() == bins.centers[p.numpy().argmax(-1)].tolist()


@pytest.mark.parametrize("sigma", [0.6, 2.0, 6.0])
def test_soft_labels_decode_to_their_labels(sigma: float) -> None:
    labels = torch.arange(40, 75).double()  # far from the ends
    soft = soft_labels(labels, AGES, sigma)
    for point in POINTS:
        assert_close(decode(soft, AGES, point), labels, rtol=0, atol=1e-9)  # type: ignore[arg-type]
    lower, upper = interval(soft_labels(labels, AGES, 6.0), AGES, 0.9)
    assert_close(upper - lower, torch.full((35,), 2 * 1.6449 * 6).double(), rtol=1e-2, atol=0)


@each_axis
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_that_rounding_took_off_one(bins: Bins, dtype: torch.dtype) -> None:
    p = distributions(bins, 50, dtype=dtype)
    exact = p.double() / p.double().sum(-1, keepdim=True)
    for point in POINTS:
        given = decode(p, bins, point)  # type: ignore[arg-type]
        assert given.dtype == torch.float32
        assert_close(given.double(), decode(exact, bins, point), rtol=1e-4, atol=1e-4)  # type: ignore[arg-type]
    ends = quantiles(p, bins, [1e-6, 0.9999999])
    assert (ends >= limits(bins, p)[0]).all()
    assert (ends <= limits(bins, p)[-1]).all()
    short = torch.full((4,), 0.2499, dtype=torch.float64)
    assert quantiles(short, Bins.uniform(0, 4, width=1), [0.25, 0.75]).tolist() == pytest.approx([1, 3])
    assert decode(short, Bins.uniform(0, 4, width=1)).item() == pytest.approx(2)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3), (2, 3, 4)])
def test_any_leading_shape_is_taken(shape: tuple[int, ...]) -> None:
    p = distributions(UNEVEN, *shape)
    copy = p.clone()
    for point in POINTS:
        assert decode(p, UNEVEN, point).shape == shape  # type: ignore[arg-type]
    assert quantiles(p, UNEVEN, (0.1, 0.5)).shape == (*shape, 2)
    assert quantiles(p, UNEVEN, 0.1).shape == quantiles(p, UNEVEN, torch.tensor(0.1)).shape == (*shape, 1)
    assert [end.shape for end in interval(p, UNEVEN)] == [shape, shape]
    for row, median in zip(p.reshape(-1, 5), decode(p, UNEVEN, "median").flatten(), strict=True):
        assert torch.equal(decode(row, UNEVEN, "median"), median)
    assert torch.equal(p, copy)


def test_one_bin_decodes_to_its_center() -> None:
    p, bins = torch.ones(2, 1), Bins.from_edges([2, 6])
    assert [decode(p, bins, point).tolist() for point in POINTS] == [[4, 4]] * 3  # type: ignore[arg-type]
    assert interval(p, bins, 0.5)[0].tolist() == [3, 3]


def test_classes_have_a_mode_alone() -> None:
    p = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.2, 0.2]])
    assert decode(p, CLASSES, "mode").tolist() == [1, 0]
    assert decode(p, CLASSES, "mode").dtype == torch.int64
    rule = r"bins must cut a continuous label axis for {}, got Bins\.classes\(3\)\. Use decode\(.*\"mode\"\)"
    for point in ("expectation", "median"):
        with pytest.raises(ValueError, match=r"^decode: " + rule.format(f"point='{point}'")):
            decode(p, CLASSES, point)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^quantiles: " + rule.format("quantiles")):
        quantiles(p, CLASSES, 0.5)
    with pytest.raises(ValueError, match=r"^interval: " + rule.format("an interval")):
        interval(p, CLASSES)


def test_gradients_agree_with_differences() -> None:
    scores = torch.randn(3, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    for point in ("expectation", "median"):
        assert torch.autograd.gradcheck(lambda s, h=point: decode(s.softmax(-1), UNEVEN, h), scores)
    assert torch.autograd.gradcheck(lambda s: interval(s.softmax(-1), UNEVEN), scores)


@pytest.mark.parametrize("name", ["decode", "quantiles", "interval"])
def test_what_is_no_distribution_is_refused(name: str) -> None:
    call: Any = {"decode": decode, "quantiles": partial(quantiles, levels=0.5), "interval": interval}[name]
    p = distributions(UNEVEN, 2)
    with pytest.raises(TypeError, match=rf"^{name}: probabilities must be a torch\.Tensor, got ndarray"):
        call(p.numpy(), UNEVEN)
    with pytest.raises(TypeError, match=rf"^{name}: probabilities must be floats, got dtype torch\.int64"):
        call(p.long(), UNEVEN)
    with pytest.raises(TypeError, match=f"^{name}: bins must be a Bins, got int"):
        call(p, 5)
    for bad in (p[:, :4], p.mT, torch.tensor(1.0)):
        with pytest.raises(ShapeError, match=rf"^{name}: probabilities must be \(\.\.\., 5\), one per bin"):
            call(bad, UNEVEN)
    with pytest.raises(
        ValueError, match=f"^{name}: probabilities must sum to one along the last axis, got sums from 2"
    ):
        call(2 * p, UNEVEN)
    with pytest.raises(ValueError, match=f"^{name}: probabilities must not be negative, got a minimum of -0.5"):
        call(torch.tensor([1.5, -0.5, 0, 0, 0]), UNEVEN)
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"^{name}: probabilities must be finite, got {value} at index \[1, 2\]"):
            call(p.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(value).double()), UNEVEN)


def test_settings_are_checked() -> None:
    p = distributions(UNEVEN, 2)
    with pytest.raises(ValueError, match=r"^decode: point must be one of 'expectation', 'median', 'mode', got 'mean'"):
        decode(p, UNEVEN, "mean")  # type: ignore[arg-type]
    for value in (0, 1, -0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=f"^interval: level must be > 0 and < 1, got {value}"):
            interval(p, UNEVEN, value)
        for levels in (value, [0.5, value]):
            with pytest.raises(ValueError, match=f"^quantiles: levels must be > 0 and < 1, got {value}"):
                quantiles(p, UNEVEN, levels)
        with pytest.raises(ValueError, match=r"^quantiles: levels must be"):
            quantiles(p, UNEVEN, torch.tensor([0.5, value]))
    with pytest.raises(TypeError, match=r"^interval: level must be a number, got '0.9'"):
        interval(p, UNEVEN, "0.9")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^quantiles: levels must be a number, got '0\.5'"):
        quantiles(p, UNEVEN, "0.5")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^quantiles: levels must be a number, got None"):
        quantiles(p, UNEVEN, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^quantiles: levels must be one number or a row of them, .*, got none"):
        quantiles(p, UNEVEN, [])
    for row in (torch.tensor([]), torch.tensor([[0.5]])):
        with pytest.raises(ShapeError, match=r"^quantiles: levels must be one number or a row of them, .*, got shape"):
            quantiles(p, UNEVEN, row)
    with pytest.raises(ValueError, match=r"^quantiles: probabilities and levels must be on the same device"):
        quantiles(p, UNEVEN, torch.ones(1, device="meta"))


class Decoder(torch.nn.Module):
    def forward(self, scores: Tensor) -> tuple[Tensor, ...]:
        p = scores.softmax(-1)
        points = tuple(decode(p, UNEVEN, point) for point in POINTS)  # type: ignore[arg-type]
        return (*points, *interval(p, UNEVEN, 0.8), quantiles(p, UNEVEN, [0.1, 0.9]))


def test_one_graph_that_reads_no_values_and_can_be_exported() -> None:
    scores = torch.randn(4, 5, generator=torch.Generator().manual_seed(3))
    expected = Decoder()(scores)
    assert all(x.device.type == "meta" for x in Decoder()(scores.to("meta")))
    assert_close(torch.compile(Decoder(), fullgraph=True, backend="eager")(scores), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.4 warns of its own nodes
        batch = torch.export.Dim("batch")
        exported = torch.export.export(Decoder(), (scores[:3],), dynamic_shapes=({0: batch},), strict=False).module()
    assert_close(tuple(exported(scores)), expected)


def test_autocast_takes_nothing_away() -> None:
    p = distributions(AGES, 20, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = [decode(p, AGES, point) for point in POINTS]  # type: ignore[arg-type]
    assert_close(inside, [decode(p, AGES, point) for point in POINTS])  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_axis_far_from_zero_is_decoded_as_one_at_zero(dtype: torch.dtype) -> None:
    start = 1_700_000_000  # where float32 goes in steps of 128
    near, far = Bins.uniform(0, 3600, width=60), Bins.uniform(start, start + 3600, width=60)
    p = distributions(near, 200, dtype=dtype)
    for point in POINTS:
        expected = decode(p.double(), near, point)  # type: ignore[arg-type]
        assert_close(decode(p, far, point) - start, expected, rtol=0, atol=1e-3)  # type: ignore[arg-type]
        assert_close(far.expectation(p) - start, near.expectation(p.double()), rtol=0, atol=1e-3)
    assert_close(quantiles(p, far, LEVELS) - start, quantiles(p.double(), near, LEVELS), rtol=0, atol=1e-3)
    assert_close(interval(p, far)[0] - start, interval(p.double(), near)[0], rtol=0, atol=1e-3)
    assert limits(far, p).diff().tolist() == [60] * 60


def test_predictions_are_as_wide_as_the_axis_needs() -> None:
    p = torch.full((4,), 0.25)
    for low, width, dtype in ((0, 1, torch.float32), (2000, 1, torch.float32), (738_000, 1, torch.float64)):
        assert decode(p, Bins.uniform(low, low + 4 * width, width=width)).dtype == dtype
    assert decode(p, Bins.from_edges([1e-6, 1e-3, 1, 1e3, 1e6])).dtype == torch.float32


@pytest.mark.parametrize("bins", [AGES, UNEVEN, Bins.uniform(1.7e9, 1.7e9 + 60, width=1)], ids=["a", "u", "far"])
@pytest.mark.parametrize("point", POINTS[:2])
def test_what_inference_mode_used_first_can_be_trained_with(bins: Bins, point: Any) -> None:
    bins = Bins.from_dict(bins.to_dict())  # that nothing has used
    scores = torch.zeros(3, len(bins), requires_grad=True)
    with torch.inference_mode():
        decode(scores.softmax(-1), bins, point)
        bins.expectation(scores.softmax(-1))
        soft_labels(torch.full((3,), bins.centers[1].item(), dtype=torch.float64), bins, 2.0)
        made_inside = Bins.from_dict(bins.to_dict())
    for axis in (bins, made_inside):
        (decode(scores.softmax(-1), axis, point) * scores.softmax(-1).sum(-1)).sum().backward()
        axis.expectation(scores.softmax(-1)).sum().backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("mixed", [True, False])
def test_nothing_fake_is_kept(mixed: bool) -> None:
    bins = Bins.uniform(0, 4, width=1)
    if not mixed:
        decode(torch.full((2, 4), 0.25), bins, "median")  # keeps what fake tensors do not mix with
    with FakeTensorMode(allow_non_fake_inputs=mixed):
        fake = decode(torch.full((2, 4), 0.25), bins, "median")
        assert soft_labels(torch.tensor([1.0, 2.0]), bins, 1.0).shape == (2, 4)
    assert isinstance(fake, FakeTensor)
    for point in POINTS:
        real = decode(torch.full((2, 4), 0.25), bins, point)  # type: ignore[arg-type]
        assert type(real) is Tensor
    assert soft_labels(torch.tensor([2.0]), bins, 1.0).sum().item() == pytest.approx(1)


def test_per_sample_gradients_equal_a_loop() -> None:
    scores = distributions(UNEVEN, 6).log().clamp_min(-9)
    labels = torch.tensor([-2.0, -1.0, 0.05, 2.0, 3.0, 20.0]).double()

    def loss(row: Tensor, label: Tensor) -> Tensor:
        p = row.softmax(-1)
        points = sum((decode(p, UNEVEN, point) - label).square() for point in POINTS[:2])  # type: ignore[arg-type]
        ends = torch.stack(interval(p, UNEVEN)).sum() + UNEVEN.expectation(p)
        return points + ends - (soft_labels(label, UNEVEN, 1.0, unit="bin") * row.log_softmax(-1)).sum()

    together = torch.func.vmap(torch.func.grad(loss))(scores, labels)
    one_by_one = torch.stack([torch.func.grad(loss)(row, label) for row, label in zip(scores, labels, strict=True)])
    rows = scores.clone().requires_grad_()
    sum(loss(row, label) for row, label in zip(rows, labels, strict=True)).backward()  # type: ignore[union-attr]
    assert_close(together, one_by_one)
    assert_close(together, rows.grad)


def test_another_default_device_changes_nothing() -> None:
    p = torch.full((2, 4), 0.25)
    with torch.device("meta"):
        bins = Bins.uniform(0, 4, width=1)
        result = [decode(p, bins, point) for point in POINTS]  # type: ignore[arg-type]
        result += [quantiles(p, bins, [0.2, 0.7]), *interval(p, bins), soft_labels(p[:, 0], bins, 1.0, unit="bin")]
        assert bins.index([1.0, 2.5]).tolist() == [1, 2]
    assert all(x.device.type == "cpu" for x in result)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_traces_what_it_is_not_shown(mode: Any) -> None:
    def both(p: Tensor, labels: Tensor) -> Tensor:
        return decode(p, AGES, "median") + AGES.index(labels) + (soft_labels(labels, AGES, 2.0) * p).sum(-1)

    p, labels = distributions(AGES, 3), torch.tensor([3.0, 50.0, 99.0])
    traced = make_fx(both, tracing_mode=mode)(p, labels)
    other = labels + 7
    assert_close(traced(p.flip(0), other), both(p.flip(0), other))


# ---- from quantiles or another axis ----


def test_shares_of_bins_from_quantiles_are_those_of_the_piecewise_even_distribution() -> None:
    bins = Bins.from_edges([0, 1, 4, 10])
    points = [[2.0, 4.0, 6.0], [-1.0, 0.5, 12.0]]
    shares = bin_shares(points, [0.25, 0.5, 0.75], bins)
    # Below 2 a quarter is spread evenly over two units; from 4 a quarter to 6, and a quarter over the last four.
    np.testing.assert_allclose(shares[0], [0.125, 0.375, 0.5], rtol=1e-9)
    # Of the middle quarters, 1 / 11.5 of the second lies between 0.5 and 1, and 3 / 11.5 of it up to 4.
    low = 0.5 + 0.25 * 0.5 / 11.5
    np.testing.assert_allclose(shares[1], [low, 0.25 * 3 / 11.5, 1 - low - 0.25 * 3 / 11.5], rtol=1e-9)


def test_shares_over_another_axis_come_back_on_a_finer_one_and_ties_lie_in_the_bin_above() -> None:
    bins, coarse = Bins.uniform(0, 10, count=10), np.array([0.2, 0.5, 0.3])
    borders, cumulative = [0.0, 2.0, 5.0, 10.0], np.concatenate([[0], coarse.cumsum()])
    shares = bin_shares(borders, cumulative, bins)[0]
    np.testing.assert_allclose([shares[:2].sum(), shares[2:5].sum(), shares[5:].sum()], coarse, rtol=1e-9)
    np.testing.assert_allclose(bin_shares([3.0, 3.0], [0.0, 1.0], bins)[0], np.eye(10)[3], atol=1e-9)


def test_cumulated_probabilities_may_end_above_one_by_rounding_and_no_rows_give_no_rows() -> None:
    bins, random = Bins.uniform(0, 4, count=50), np.random.default_rng(0)
    shares = random.dirichlet(np.ones(50), 30)
    cumulative = np.pad(shares.cumsum(1), ((0, 0), (1, 0)))
    assert cumulative.max() > 1
    np.testing.assert_allclose(bin_shares(bins.edges, cumulative, bins), shares, atol=1e-12)
    for points in (bins.edges, np.zeros((0, 51))):
        assert bin_shares(points, cumulative[:0], bins).shape == (0, 50)
    assert bin_shares(np.zeros((0, 51)), cumulative[0], bins).shape == (0, 50)


def test_points_that_fall_or_do_not_fit_are_refused() -> None:
    bins = Bins.uniform(0, 10, count=10)
    for points, cumulative in (([2.0, 1.0], [0.1, 0.9]), ([1.0, 2.0], [0.9, 0.1])):
        with pytest.raises(ValueError, match="bin_shares: points and cumulative must not fall along the last axis"):
            bin_shares(points, cumulative, bins)
    with pytest.raises(ValueError, match=r"bin_shares: cumulative must be in \[0, 1\], got values from 0.5 to 1.5"):
        bin_shares([1.0, 2.0], [0.5, 1.5], bins)
    with pytest.raises(ShapeError, match=r"points must fit cumulative \(1, 3\), got shape \(1, 2\)"):
        bin_shares([1.0, 2.0], [0.1, 0.5, 0.9], bins)
    with pytest.raises(ValueError, match="points must be finite"):
        bin_shares([np.nan, 2.0], [0.1, 0.9], bins)
    with pytest.raises(ValueError, match="shares from points"):
        bin_shares([1.0, 2.0], [0.1, 0.9], Bins.classes(3))
