"""What losses check of their arguments alike, and the few promises that are not those of one loss."""

from __future__ import annotations

import re
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import dir_toolkit as dt
from dir_toolkit.errors import DirToolkitWarning, ShapeError
from dir_toolkit.losses import _inputs, conr_loss, cross_entropy, rank_n_contrast
from dir_toolkit.losses._inputs import checked_prior, per_class
from dir_toolkit.losses._loss import reduce


@pytest.fixture(autouse=True)
def unwarned(monkeypatch: pytest.MonkeyPatch) -> None:
    """There was no warning of weights per class yet."""
    monkeypatch.setattr(_inputs, "_warned_of_class_weights", False)


def test_weights_per_class_are_refused_where_samples_are_as_many_as_classes_only_by_a_warning() -> None:
    logits, per_class = torch.randn(4, 4), torch.tensor([1.0, 2.0, 3.0, 4.0])
    target = torch.tensor([0, 1, 1, 3])
    with pytest.raises(ShapeError, match=r"weight must be \(3,\), .*, got shape \(4,\)\. Use weight\[target\] for one"):
        cross_entropy(logits[:3], target[:3], per_class)
    with pytest.warns(
        DirToolkitWarning, match=r"^cross_entropy: weight must hold one .* samples of class 1 .*weight\[target\]"
    ):
        cross_entropy(logits, target, per_class)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cross_entropy(logits, target, per_class)  # the warning is issued once


@pytest.mark.parametrize("weight", [[1.0, 2.0, 2.0, 4.0], [3.0] * 4, [1.0, 0.0, 2.0, 4.0], [0.0] * 4])
def test_honest_weights_per_sample_raise_no_warning(weight: list[float]) -> None:
    """Those of labels are equal within a class, and a mask leaves samples out."""
    assert cross_entropy(torch.zeros(4, 4), torch.tensor([0, 1, 1, 3]), torch.tensor(weight)) >= 0


def test_reductions_are_those_worked_out_by_hand() -> None:
    values, weight = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1, 0, 2])
    assert reduce(values, None, "mean") == 3
    assert reduce(values, weight, "none").tolist() == [1, 0, 12]
    assert reduce(values, weight, "sum") == 13
    assert reduce(values, weight, "mean") == pytest.approx(13 / 3)  # by N, not by the sum of weights


def test_one_value_per_class_may_come_as_any_array() -> None:
    scores = torch.zeros(2, 3)
    locked = np.array([3, 2, 1])[::-1]
    locked.setflags(write=False)
    for value in (torch.tensor([1, 2, 3]), [1, 2, 3], (1.0, 2.0, 3.0), locked, locked.astype(np.uint64)):
        assert per_class("counts", value, scores).tolist() == [1, 2, 3]
    assert per_class("counts", torch.tensor([1, 2, 3]), scores).dtype == torch.float32
    assert per_class("counts", torch.tensor([1, 2, 3]), scores.double()).dtype == torch.float64
    assert per_class("counts", [1, 2, 3], scores.to("meta")).device.type == "meta"


def test_one_value_per_class_is_checked() -> None:
    scores = torch.zeros(2, 3)
    check = partial(per_class, "p", logits=scores)
    for value in ([1.0, 2.0], torch.ones(3, 1), 1.0, torch.ones(2)):
        with pytest.raises(ShapeError, match=r"^\S+: p must be \(3,\), one value per class, got shape"):
            check(value)
    for value in ([1.0, torch.nan, 1.0], torch.tensor([1.0, torch.inf, 1.0])):
        with pytest.raises(ValueError, match=r"^\S+: p must be finite, got (nan|inf) at index \[1\]"):
            check(value)
    with pytest.raises(ValueError, match=r"^\S+: p must not be negative, got -2 for class 2\.$"):
        check([0, 0, -2])
    with pytest.raises(ValueError, match=r"^\S+: p must be positive, got 0 for class 1\. Mend it\.$"):
        check([1, 0, 0], positive="Mend it.")
    for value in ("abc", None, torch.ones(3) > 0):
        with pytest.raises(TypeError, match=r"^\S+: p must be integers or floats, got (dtype|NoneType)"):
            check(value)
    with pytest.raises(ValueError, match=r"^\S+: logits and p must be on the same device, got cpu and meta"):
        check(torch.ones(3, device="meta"))


def test_a_prior_comes_as_any_array_and_is_checked() -> None:
    scores = torch.zeros(2, 3)
    for value in (torch.tensor([0.5, 0.25, 0.25]), [0.5, 0.25, 0.25], np.array([0.5, 0.25, 0.25])):
        assert checked_prior(value, scores).tolist() == [0.5, 0.25, 0.25]
    with pytest.raises(
        ValueError, match=r"^\S+: prior must be positive, got 0 for class 1\. Use dt\.class_prior\(counts\)"
    ):
        checked_prior([0.5, 0, 0.5], scores)
    with pytest.raises(
        ValueError, match=r"^\S+: prior must sum to one, got a sum of 6\. Use dt\.class_prior\(counts\)"
    ):
        checked_prior([1, 2, 3], scores)
    with pytest.raises(ShapeError, match=r"^\S+: prior must be \(3,\), one value per class, got shape \(2,\)"):
        checked_prior([0.5, 0.5], scores)


@pytest.mark.parametrize("shape", [(4, 6, 5), (4, 6, 7, 5)])
def test_features_of_sequences_are_to_be_flattened_with_their_labels(shape: tuple[int, ...]) -> None:
    features, labels = torch.randn(shape), torch.rand(shape[:-1])
    last = len(shape) - 2
    advice = rf"Use features\.flatten\(0, {last}\) and target\.flatten\(\)\.$"
    with pytest.raises(ShapeError, match=advice):
        conr_loss(features, labels, pred=labels)
    with pytest.raises(ShapeError, match=advice):
        rank_n_contrast(features, labels)
    conr_loss(features.flatten(0, last), labels.flatten(), pred=labels.flatten())
    rank_n_contrast(features.flatten(0, last), labels.flatten())
    with pytest.raises(ShapeError, match=r"Use features\.flatten\(1\)\.$"):
        rank_n_contrast(features, labels[:, 0].flatten()[:4])
    classes = (labels * 5).long()
    with pytest.raises(ShapeError, match=rf"Use logits\.flatten\(0, {last}\) and target\.flatten\(\)\.$"):
        cross_entropy(features, classes)
    maps = features.movedim(-1, 1)
    advice = rf"Use logits\.movedim\(1, -1\)\.flatten\(0, {last}\) and target\.flatten\(\)\.$"
    with pytest.raises(ShapeError, match=advice):
        cross_entropy(maps, classes)
    given = cross_entropy(maps.movedim(1, -1).flatten(0, last), classes.flatten())
    assert_close(given, nn.functional.cross_entropy(maps, classes))


def test_rows_of_classes_get_the_advice_that_fits_them() -> None:
    scores = torch.zeros(3, 5)
    one_hot = torch.eye(5, dtype=torch.int64)[:3]
    with pytest.raises(ShapeError, match=r"Use target\.argmax\(1\) on one-hot rows\.$"):
        cross_entropy(scores, one_hot)
    several = one_hot.clone()
    several[1, 3] = 1
    for target in (several, torch.zeros_like(one_hot)):
        with pytest.raises(ShapeError, match=r"one class per sample: .*binary_cross_entropy_with_logits\.$"):
            cross_entropy(scores, target)


def test_learnt_numbers_have_a_dimension_that_can_be_sharded() -> None:
    learnt = [
        dt.losses.BatchMCLoss().log_sigma,
        dt.losses.GaussianMixtureLoss([1.0], [2.0], [3.0]).log_sigma,
        dt.losses.BinnedIntegrationLoss(dt.Bins.uniform(0, 10, count=5), [0.2] * 5).log_sigma,
        dt.AffinityHead(4, 3, sigma_mode="learnt").log_sigma,
        dt.heads.CosineHead(4, 3, learn_scale=True).log_scale,
    ]
    assert [tuple(number.shape) for number in learnt] == [(1,)] * 5
    for made in (dt.losses.CenterLoss(4, 3), dt.heads.ScaledHead(nn.Linear(4, 3))):
        assert all(parameter.ndim > 0 for parameter in made.parameters())


def test_every_loss_is_declared_to_the_tester() -> None:
    declared = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    functions = [name for name in dt.losses.__all__ if name.islower() and name != "gaussian_interval"]
    assert len(functions) > 20
    assert [name for name in functions if not re.search(rf"staticmethod\((conr\.)?{name}\)", declared)] == []
