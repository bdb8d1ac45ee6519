"""Intervals of a model once calibrated: right in each region, whatever the model is worth."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

import dir_toolkit as dt
from dir_toolkit.conformal import BinsConformal, PointConformal
from dir_toolkit.longtail import LongTailModel

BINS, CLASSES = dt.Bins.uniform(0, 12, width=1), dt.Bins.classes(12)
COUNTS = [300] * 4 + [60] * 4 + [9] * 4
HEADS = ("regression", "gaussian", "linear", "classes")
READ = {"regression": "scores", "gaussian": "scores", "linear": "distribution", "classes": "distribution"}


def untrained(head: str = "linear", **options: Any) -> LongTailModel:
    bins = CLASSES if head == "classes" else BINS
    with torch.random.fork_rng():
        torch.manual_seed(0)
        options |= {"sigma": 0.5} if head == "linear" else {}
        head = "linear" if head == "classes" else head
        return LongTailModel(nn.Linear(2, 4), 4, bins, density=dt.LabelDensity(bins, COUNTS), head=head, **options)


def drawn(samples: int = 600, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs that tell a little of their labels, which are evenly drawn whole numbers."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(12, (samples,), generator=generator)
    noise = torch.randn(samples, 2, generator=generator)
    return noise + labels[:, None] / 6 - 1, labels


def calibrated(head: str = "linear", level: float = 0.9, **options: Any) -> LongTailModel:
    model, (x, labels) = untrained(head), drawn()
    model.calibrate_intervals(model(x).scores, labels, level, **options)
    return model


@pytest.mark.parametrize("head", HEADS)
def test_a_model_that_has_learnt_nothing_covers_each_region(head: str) -> None:
    model, (x, labels) = calibrated(head, 0.8), drawn(6000, seed=1)
    out = model(x)
    if head in ("linear", "classes"):
        held = model.sets(out).gather(1, labels[:, None])[:, 0]
    if head != "classes":
        lower, upper = model.interval(out)
        inside = (lower <= labels) & (labels <= upper)
        assert head != "linear" or bool((held <= inside).all())  # the interval holds the set
        held = inside
    for region in range(3):
        own = labels // 4 == region
        assert held[own].double().mean() >= 0.8 - 4 * (0.16 * (1 / 200 + 1 / 2000)) ** 0.5


def test_the_model_gives_what_the_plain_classes_give() -> None:
    x, labels = drawn()
    model = untrained()
    model.set_prior("uniform", 0.5)
    out = model(x)
    plain = BinsConformal(model.density, prior=model.readout.training_prior("auto", None), per_region=0.5, gamma=1.0)
    plain.update(out.distribution, labels)
    model.calibrate_intervals(out.scores, labels, 0.8, per_region=0.5, gamma=1.0)
    assert torch.equal(model.sets(out), plain.sets(out.distribution, 0.8))
    for own, same in zip(model.interval(out.distribution, 0.8), plain.interval(out.distribution, 0.8), strict=True):
        assert torch.equal(own, same)
    point = untrained("regression")
    scores = point(x).scores
    plain = PointConformal(point.density)
    plain.update(scores, labels)
    point.calibrate_intervals(scores, labels)
    for own, same in zip(point.interval(scores), plain.interval(scores), strict=True):
        torch.testing.assert_close(own, same, rtol=1e-5, atol=1e-4)
    held = untrained("regression", within_axis=True)
    held.calibrate_intervals(scores, labels)
    assert held.interval(scores)[1].max() == 12 < point.interval(scores)[1].max()


def test_before_it_is_calibrated_the_interval_is_the_central_one() -> None:
    model, (x, _) = untrained(), drawn()
    out = model(x)
    for own, same in zip(model.interval(out), dt.interval(out.distribution, BINS, 0.9, ends="open"), strict=True):
        assert torch.equal(own, same)
    with pytest.raises(
        RuntimeError, match=r"^LongTailModel\.sets: intervals must be calibrated, .* Call calibrate_int"
    ):
        model.sets(out)


def test_a_table_of_predictions_has_the_calibrated_ends() -> None:
    model, (x, _) = calibrated(level=0.8), drawn()
    table = model.predict(x)
    assert table["lower"].attrs["interval_level"] == 0.8
    np.testing.assert_array_equal(table["upper"], model.interval(model(x))[1])


@pytest.mark.parametrize("head", HEADS)
def test_states_files_and_copies_hold_the_calibration(head: str, tmp_path: Path) -> None:
    model, (x, _) = calibrated(head), drawn()
    out = model(x)
    other = untrained(head)
    other.load_state_dict(model.state_dict())
    model.save(tmp_path / "model.safetensors")
    loaded = dt.load(tmp_path / "model.safetensors", nn.Linear(2, 4))
    for same in (other, loaded, copy.deepcopy(model), copy.deepcopy(model).half().float()):
        assert torch.equal(same.sets(getattr(out, READ[head])), model.sets(out))


def test_another_prior_makes_the_calibration_stale() -> None:
    model, (x, labels) = calibrated(), drawn()
    out = model(x)
    with pytest.warns(dt.DirToolkitWarning, match=r"LongTailModel\.set_prior: intervals were calibrated under another"):
        model.set_prior("uniform")
    for ask in (model.interval, model.sets):
        with pytest.raises(RuntimeError, match="must be calibrated under the prior of the predictions"):
            ask(model(x))
    model.set_prior("uniform", 0.5)  # nothing more to warn of
    model.calibrate_intervals(out.scores, labels)
    model.interval(model(x))


def test_wrong_arguments_are_refused() -> None:
    model, (x, labels) = untrained(), drawn()
    scores = model(x).scores
    broken = scores.clone()
    broken[2, 1] = torch.nan
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: model.calibrate_intervals(scores, labels, 0), ValueError, "level must be > 0 and < 1, got 0"),
        (lambda: model.calibrate_intervals(scores, labels, 1e-50), ValueError, "level must fit into float32"),
        (lambda: model.calibrate_intervals(scores, labels, 1), ValueError, "level must be > 0 and < 1, got 1"),
        (
            lambda: model.calibrate_intervals(broken, labels),
            ValueError,
            r"scores must be finite, got nan at index \[2, 1",
        ),
        (lambda: model.calibrate_intervals(scores, labels * np.nan), dt.LabelError, "labels must not be NaN"),
        (lambda: model.calibrate_intervals(scores, labels + 20), dt.LabelError, "labels must lie on the label axis"),
        (lambda: model.calibrate_intervals(scores[:, 1:], labels), ValueError, r"scores must be \(N, 12\), output\."),
        (
            lambda: model.calibrate_intervals(scores, labels[1:]),
            ValueError,
            r"labels must be \(600,\), one per forecast",
        ),
        (
            lambda: LongTailModel(nn.Identity(), 2, BINS).calibrate_intervals(scores, labels),
            ValueError,
            "calibrate_intervals needs density",
        ),
        (
            lambda: calibrated().interval(scores.softmax(1), 0.8),
            ValueError,
            "level must be 0.9, for which intervals are",
        ),
        (lambda: calibrated().interval(scores), ValueError, "output must sum to one"),
        (lambda: calibrated("classes").interval(scores), RuntimeError, "give intervals of a label, got a ClassR.*sets"),
        (lambda: untrained("regression").interval(scores[:, 0]), RuntimeError, "must give intervals of a label"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=rf"^LongTailModel.*{message}"):
            call()
    assert model.readout.intervals.level == 0  # nothing has changed


def test_labels_that_no_interval_reaches_are_warned_of() -> None:
    x, labels = drawn()
    beyond = labels.double().where(labels < 11, 30.0)
    lost = int((beyond == 30).sum())
    for head, options, fix in (
        ("regression", {"within_axis": True}, "a wider axis, or within_axis=False"),
        ("linear", {}, "a wider axis, or an unbounded one"),
    ):
        model: Any = untrained(head, **options)
        with pytest.warns(dt.DirToolkitWarning, match=rf"calibrate_intervals: {lost} of 600 labels .* Use {fix}\.$"):
            model.calibrate_intervals(model(x).scores, beyond, outside="clip")
        assert (model.interval(model(x))[1] <= 12).all()
    endless = dt.Bins(np.arange(13.0), unbounded=True)
    density = dt.LabelDensity(endless, np.ones(12))
    short = LongTailModel(nn.Identity(), 2, endless, density=density, head="regression", within_axis=True)
    with pytest.warns(dt.DirToolkitWarning, match=rf"{lost} of 600 labels .* or within_axis=False\.$"):
        short.calibrate_intervals(short(x).scores, beyond)
    free = untrained("regression")
    free.calibrate_intervals(free(x).scores, beyond, outside="clip")
    assert (free.interval(free(x))[1] > 12).all()


def test_missing_labels_calibrate_nothing_where_the_model_drops_them() -> None:
    x, labels = drawn()
    gaps = labels.double().where(torch.arange(len(labels)) % 5 > 0, torch.nan)
    there = ~gaps.isnan()
    model, other = untrained(missing="drop"), untrained()
    model.calibrate_intervals(model(x).scores, gaps)
    other.calibrate_intervals(other(x).scores[there], labels[there])
    assert torch.equal(model.sets(model(x)), other.sets(other(x)))
    with pytest.raises(dt.LabelError, match="labels must not be NaN"):
        other.calibrate_intervals(other(x).scores, gaps)
    rule = r"calibration samples, got none\. Give some with labels on the axis first\."
    with pytest.raises(ValueError, match=rule):
        model.calibrate_intervals(model(x).scores, gaps * torch.nan)


def test_labels_are_counted_as_the_model_takes_them() -> None:
    options = {"bins": dt.Bins.uniform(0, 3, width=1), "sigma": 0.5}
    gaps = LongTailModel.for_labels(nn.Linear(2, 4), 4, [0.5, 1.5, np.nan], missing="drop", **options)
    beyond = LongTailModel.for_labels(nn.Linear(2, 4), 4, [0.5, 1.5, 9.0], outside="clip", **options)
    assert gaps.density is not None
    assert beyond.density is not None
    assert (gaps.density.counts.tolist(), beyond.density.counts.tolist()) == ([1, 1, 0], [1, 1, 1])


@pytest.mark.parametrize("head", ["linear", "regression", "gaussian"])
def test_intervals_are_exported_and_compiled_with_the_model(head: str) -> None:
    class WithInterval(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = untrained(head).eval()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            output = self.model(x)
            return output.prediction, *self.model.interval(output)

    x, labels = drawn()
    plain, known, loaded = WithInterval(), WithInterval(), WithInterval()
    known.model.calibrate_intervals(known.model(x).scores, labels)
    loaded.load_state_dict(known.state_dict())
    for module in (loaded, known) if head == "regression" else (plain, loaded, known):
        sizes = ({0: torch.export.Dim("rows", min=2)},)
        exported = torch.export.export(module, (x[:9],), dynamic_shapes=sizes).module()
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        for made in (exported(x[:50]), compiled(x[:50])):
            for end, same in zip(made, known(x[:50]) if module is loaded else module(x[:50]), strict=True):
                torch.testing.assert_close(end, same)


def test_intervals_on_a_chosen_axis_are_finite_and_hold_what_they_promise() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6000, 2, generator=generator)
    labels = (x[:, 0] + 0.3 * torch.randn(6000, generator=generator)).exp()
    torch.manual_seed(0)
    model = LongTailModel.for_labels(nn.Linear(2, 8), 8, labels[:3000]).eval()
    model.calibrate_intervals(model(x[3000:4500]).scores, labels[3000:4500])
    lower, upper = model.interval(model(x[4500:]))
    assert lower.isfinite().all()
    assert upper.isfinite().all()
    assert ((lower <= labels[4500:]) & (labels[4500:] <= upper)).float().mean() > 0.88


@pytest.mark.parametrize("head", ["linear", "regression", "gaussian", "classes"])
def test_batches_calibrate_as_their_scores_do_in_eval_mode(head: str) -> None:
    x, labels = drawn()
    model, other = untrained(head), untrained(head)
    for one in (model, other):
        one.backbone = nn.Sequential(one.backbone, nn.Dropout(0.5))
    other.calibrate_intervals(other.eval()(x).scores, labels, 0.8)
    batches = DataLoader(TensorDataset(x, labels), batch_size=70)
    model.calibrate_intervals(batches, level=0.8)
    assert model.training
    assert torch.equal(model.readout.intervals.thresholds, other.readout.intervals.thresholds)
    assert model.readout.intervals.exact_level == 0.8
    with pytest.raises(ValueError, match=r"scores need labels, got labels=None\. Pass scores and labels\.$"):
        model.calibrate_intervals(model(x).scores)


@pytest.mark.parametrize("head", ["linear", "regression", "gaussian"])
def test_batches_of_sequences_of_several_lengths_calibrate(head: str) -> None:
    x, labels = drawn()
    model, other = untrained(head).eval(), untrained(head).eval()
    model.calibrate_intervals(
        [(x[:400].view(100, 4, 2), labels[:400].view(100, 4)), (x[400:].view(100, 2, 2), labels[400:].view(100, 2))]
    )
    other.calibrate_intervals([(x, labels)])
    assert torch.equal(model.readout.intervals.thresholds, other.readout.intervals.thresholds)
    parts = x[:400].view(100, 4, 2), x[400:].view(100, 2, 2)
    of_sequences = labels[::6]
    model.calibrate_intervals(list(zip(parts, (of_sequences, of_sequences), strict=True)))  # one label each
    each = torch.cat([of_sequences.repeat_interleave(4), of_sequences.repeat_interleave(2)])
    other.calibrate_intervals([(x, each)])
    assert torch.equal(model.readout.intervals.thresholds, other.readout.intervals.thresholds)
    with pytest.raises(dt.ShapeError, match="labels must be"):
        model.calibrate_intervals([(part, torch.ones(part.shape[1::-1])) for part in parts])


def test_batches_calibrate_several_targets() -> None:
    x, labels = drawn()
    both = torch.stack([labels, 11 - labels], 1)
    density = dt.LabelDensity(BINS, COUNTS)
    targets = [LongTailModel(nn.Identity(), 2, BINS, density=density, sigma=0.5) for _ in range(2)]
    model = dt.MultiTargetModel(nn.Identity(), targets).eval()
    other = copy.deepcopy(model)
    model.calibrate_intervals([(x[:300], both[:300]), (x[300:], both[300:])])
    other.calibrate_intervals(other(x).scores, both)
    for one, same in zip(model.interval(model(x)), other.interval(other(x)), strict=True):
        assert torch.equal(one, same)


def test_a_graph_of_an_average_of_models_does_not_take_an_old_level() -> None:
    class WithInterval(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = untrained().eval()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.model.interval(self.model(x))

    x, labels = drawn()
    plain = WithInterval()
    average = AveragedModel(plain, use_buffers=True).eval()
    plain.model.calibrate_intervals([(x, labels)], level=0.5)
    average.update_parameters(plain)
    with pytest.raises(RuntimeError, match=r"call model\.interval once, then export again"):
        torch.export.export(average.module, (x[:9],)).module()(x[:9])
    lower, upper = average.module(x[:9])
    again = torch.export.export(average.module, (x[:9],)).module()(x[:9])
    assert torch.equal(again[0], lower)
    assert torch.equal(again[1], upper)


def test_labels_beside_batches_are_refused() -> None:
    x, labels = drawn()
    for beside in (0.8, labels):
        with pytest.raises(
            TypeError, match=r"scores must be a tensor, or batches without labels .*, got list\. Pass the"
        ):
            untrained().calibrate_intervals([(x, labels)], beside)
