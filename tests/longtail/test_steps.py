"""A model of sequences: features (N, T, D) are rows, and what is said of them has the shape of the samples."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dir_toolkit import FDS, LDS, Bins, LabelDensity, LongTailModel
from dir_toolkit.errors import DirToolkitError, ShapeError

AXIS, CLASSES = Bins.uniform(0, 20, width=1), Bins.classes(5)
NAN = float("nan")
KINDS: list[Any] = [
    (AXIS, {"head": "linear", "residual": True, "expectation_weight": 0.1}),
    (AXIS, {"head": "linear", "sigma": None}),
    (AXIS, {"head": "regression", "loss": "balanced_mse"}),
    (AXIS, {"head": "gaussian"}),
    (CLASSES, {"head": "affinity"}),
]


def drawn(bins: Bins, *, missing: bool = True) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 4, 3, generator=generator), torch.rand(6, 4, generator=generator) * len(bins)
    y = y.floor() if bins.categorical else y
    return x, y.masked_fill(torch.rand(6, 4, generator=generator) < 0.3, NAN) if missing else y


def made(bins: Bins, **options: Any) -> LongTailModel:
    torch.manual_seed(0)
    density = LabelDensity(bins, np.arange(1, len(bins) + 1) ** 2)
    model = LongTailModel(nn.Linear(3, 4), 4, bins, density=density, missing="drop", **options)
    return model


@pytest.mark.filterwarnings("ignore:.*calibration samples.*", "ignore:.*validation label.*", "ignore:.*taus.*")
@pytest.mark.parametrize(("bins", "options"), KINDS)
def test_steps_are_rows(bins: Bins, options: Any) -> None:
    x, y = drawn(bins)
    model, weight = made(bins, weights=LDS(bins).fit(np.arange(5)), **options), torch.arange(24.0).reshape(6, 4)
    for given in (None, weight):
        rows = model(x.flatten(0, 1), y.flatten(), None if given is None else given.flatten())
        steps = model(x, y, given)
        assert torch.equal(steps.loss, rows.loss)
        assert torch.equal(model.criterion(model(x), y, given), rows.loss)
        for one, other in zip(steps[1:], rows[1:], strict=True):
            assert torch.equal(one, other.reshape(6, 4, *other.shape[1:]))
    assert steps.prediction.shape == (6, 4)
    assert torch.equal(model.read(steps.features).scores, steps.scores)
    model.calibrate_intervals(rows.scores, y.flatten(), 0.5)
    thresholds = model.readout.intervals.thresholds.clone()
    model.calibrate_intervals(steps.scores, y, 0.5)
    assert torch.equal(model.readout.intervals.thresholds, thresholds)
    assert torch.equal(model.sets(steps), model.sets(rows).reshape(6, 4, -1))
    if not bins.categorical:
        for one, other in zip(model.interval(steps.scores if rows.distribution.shape[1] == 0 else steps.distribution),
                              model.interval(rows), strict=True):  # fmt: skip
            assert torch.equal(one, other.reshape(6, 4))
    table = model.predict([(x[:2], y[:2]), x[2:]])
    assert table.prediction.dims == ("sample", "step")
    assert np.array_equal(table.prediction, model.eval()(x).prediction.detach().numpy())


def test_calibration_takes_sequences_of_any_length() -> None:
    x, y = drawn(AXIS)
    model = made(AXIS)
    rows = model(x.flatten(0, 1)).scores
    tau = model.choose_tau(rows, y.flatten(), taus=[0, 0.5, 1, 2]).tau
    assert model.choose_tau(rows.reshape(6, 4, -1), y, taus=[0, 0.5, 1, 2]).tau == tau
    model.calibrate([(x[:, :1], y[:, :1]), (x[:, 1:], y[:, 1:])])
    with pytest.raises(
        ShapeError, match=r"^LongTailModel\.predict: batches must have as many steps each, got \(1,\), "
    ):
        model.predict([x[:, :1], x])


def test_a_sequence_may_share_one_label() -> None:
    x, y = drawn(AXIS, missing=False)
    model = made(AXIS)
    assert torch.equal(model(x, y[:, 0]).loss, model(x, y[:, :1].expand(6, 4)).loss)
    maps, labels = x.reshape(2, 3, 4, 3), y.reshape(2, 3, 4)
    assert model(maps, labels).prediction.shape == (2, 3, 4)
    assert torch.equal(model(maps, labels).loss, model(x, y).loss)


def test_its_fds_sees_the_steps_that_have_a_label() -> None:
    x, y = drawn(AXIS)
    counts = []
    for features, labels in ((x, y), (x.flatten(0, 1), y.flatten())):
        fds = FDS(AXIS, 4, missing="drop")
        model = made(AXIS, fds=fds)
        for _ in range(2):
            loss = model(features, labels).loss
            fds.end_epoch()
        counts.append((loss, fds.statistics()["count"], fds.statistics()["mean"].nan_to_num()))
    assert all(torch.equal(one, other) for one, other in zip(*counts, strict=True))
    assert counts[0][1].sum() == (~y.isnan()).sum()


@pytest.mark.parametrize(
    ("labels", "weight", "sentence"),
    [
        (torch.zeros(6, 5), None, r"labels must be \(6, 4\), one per step, or \(6,\), one per sequence, got shape"),
        (torch.zeros(4), None, r"labels must be \(6, 4\), .*, got shape \(4,\)"),
        (torch.zeros(6, 4, 1), None, r"labels must be \(6, 4\), .*Use labels\.squeeze\(2\)"),
        (torch.zeros(6, 4), torch.ones(4), r"weight must be \(6, 4\), .*, got shape \(4,\)"),
        (torch.zeros(6, 4), torch.ones(4, 6), r"weight must be \(6, 4\), .*, got shape \(4, 6\)"),
        (torch.zeros(6, 4), torch.ones(6, 4) > 0, r"weight must be integers or floats, got dtype torch\.bool\. Use w"),
        (torch.full((6, 4), torch.inf), None, "label"),
        (torch.zeros(6, 4, dtype=torch.bool), None, "labels must be integers or floats"),
    ],
)
def test_labels_and_masks_of_another_shape_or_kind_are_refused(labels: Any, weight: Any, sentence: str) -> None:
    with pytest.raises(DirToolkitError, match=rf"^LongTailModel: {sentence}"):
        made(AXIS)(drawn(AXIS)[0], labels, weight)


def test_half_precision_and_compiled_graphs_take_sequences() -> None:
    x, y = drawn(AXIS)
    model = made(AXIS)
    expected = model(x, y)
    compiled = torch.compile(model, backend="eager", fullgraph=True)(x, y)
    torch.testing.assert_close(compiled.loss, expected.loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(x, y.half())
    assert half.scores.dtype == torch.float32
    torch.testing.assert_close(half.loss, expected.loss, rtol=0.05, atol=0)
