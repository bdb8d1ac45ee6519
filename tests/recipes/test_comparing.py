"""The controls of FDS that recipes train."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import running
import torch
from torch import nn

import dir_toolkit as dt
from dir_toolkit.experiment.data.images import SampleSet, Splits
from dir_toolkit.experiment.study import Study, Task
from dir_toolkit.experiment.training.loop import Optimization
from dir_toolkit.experiment.training.runtime import start_runtime

sys.path.insert(0, str(running.RECIPES))
from comparing import Noisy, methods

BINS = dt.Bins.uniform(0, 1, count=8)


class LabelItself(nn.Module):
    num_features = 1

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows


@pytest.fixture
def statistics(tmp_path: Path) -> Any:
    """What an FDS has gathered in training, where the only feature is the label."""
    labels = np.random.default_rng(0).random(400).astype(np.float32)
    part = SampleSet(labels[:, None], labels, np.arange(400))
    task = Task(lambda _: Splits(part, part, part, "made", {}), BINS, lambda _: LabelItself(), "made", "label")

    def of(method: str) -> dict[str, torch.Tensor]:
        with start_runtime() as runtime:
            study = Study(tmp_path / method, task, methods("weighted_l1"), runtime, Optimization(epochs=1))
            return study.trial(task, method, 0).result().fds.statistics()

    return of


def test_fds_sees_the_features_of_each_bin_and_its_control_those_of_permuted_labels(statistics: Any) -> None:
    of_bins = torch.tensor(BINS.centers).double()
    assert statistics("fds")["mean"][:, 0] == pytest.approx(of_bins, abs=0.03)
    assert statistics("permuted")["mean"][:, 0] == pytest.approx(torch.full((8,), 0.5).double(), abs=0.15)


def test_noise_is_as_large_as_what_fds_changes() -> None:
    torch.manual_seed(0)
    labels, features = torch.rand(5000), torch.randn(5000, 2) * torch.tensor([1.0, 3.0])
    features += labels[:, None]
    fds, noisy = dt.FDS(BINS, 2, kernel=np.ones(3) / 3), Noisy(BINS, 2, kernel=np.ones(3) / 3)
    for one in (fds, noisy):
        one.update(features, labels)
        one.end_epoch()
    changed, noised = (one.calibrate(features, labels) - features for one in (fds, noisy))
    assert noised.square().mean(0) == pytest.approx(changed.square().mean(0), rel=0.1)
    assert noised.mean(0).abs().max() < 0.01
