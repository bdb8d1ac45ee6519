"""The small models that the tests of LongTailModel share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dir_toolkit.labels.bins import Bins
from dir_toolkit.labels.density import LabelDensity
from dir_toolkit.longtail import LongTailModel, LongTailOutput

AGES = Bins.uniform(0, 20, width=1)
CLASSES = Bins.classes(4)
AGE_DENSITY = LabelDensity(AGES, np.arange(1, 21)[::-1] ** 2)
CLASS_DENSITY = LabelDensity(CLASSES, np.array([40, 9, 4, 1]))
MIDDLE = np.average(AGES.centers, weights=AGE_DENSITY.counts)
SPREAD = math.sqrt(np.average((AGES.centers - MIDDLE) ** 2, weights=AGE_DENSITY.counts) + 1 / 12)


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def net(num_features: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(3, num_features), nn.Tanh())


def ages(**options: Any) -> LongTailModel:
    arguments = {"density": AGE_DENSITY, **options}
    return seeded(lambda: LongTailModel(net(), 6, AGES, **arguments))


def classes(**options: Any) -> LongTailModel:
    arguments = {"density": CLASS_DENSITY, **options}
    return seeded(lambda: LongTailModel(net(), 6, CLASSES, **arguments))


def batch(samples: int = 9, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 3, generator=generator)
    return x, (20 * torch.rand(samples, generator=generator)).clamp_max(19.9)


def same_output(a: LongTailOutput, b: LongTailOutput) -> None:
    for name, one, other in zip(a._fields, a, b, strict=True):
        assert torch.equal(one.nan_to_num(-7.0), other.nan_to_num(-7.0)), name
