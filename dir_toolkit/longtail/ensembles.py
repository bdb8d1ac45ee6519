"""Deep ensembles: several models that predict by the mean of their distributions."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._checks import instance, require, same_bins
from ..errors import DirToolkitWarning
from .model import LongTailModel
from .readouts import ScoreReadout

__all__ = ["ensemble"]

_SPREADING = ("cross_entropy", "coral_loss", "affinity_loss")
_OWN = ("num_features", "head", "fds", "loss", "target_prior", "tau", "temperature", "adjust")


def ensemble(models: Sequence[LongTailModel]) -> LongTailModel:
    r"""A model that predicts by the mean of the distributions of several trained models.

    .. math:: p(b | x) = \frac{1}{K} \sum_{k = 1}^K p_k(b | x)

    Each :math:`p_k` is the distribution that model k learnt, under the training prior. Priors, temperatures and
    biases that were set on the models have no influence, since the mean is adjusted as a whole: call ``calibrate`` on
    the ensemble. Train the models first. They become parts of the ensemble, in eval mode and on the device of the first
    one.

    Training and prediction take K times as long as those of one model.

    To load a saved ensemble, build it from untrained models: ``dt.load(path, ensemble(models).backbone,
    head=nn.Identity())``, and ``loss=`` if theirs is a function.

    Args:
        models: K models over the same bins or classes, with the same density, weights and spread of labels, and so the
            same training prior: folds and bootstraps are refused. Backbones and heads may differ; each head must score
            bins, without ``residual``.
    Returns:
        a model whose options are those of the first. Its features are the log-probabilities of the mean, (N, B).
    Raises:
        TypeError: ``models`` are not a sequence of models. ValueError: there is none, or one cannot be averaged with
        the others.
    Source:
        Lakshminarayanan, Pritzel, Blundell 2017 (arXiv:1612.01474), equation of section 2.4.

    >>> ages = [21, 34, 34, 35, 60, 33, 18, 25, 41, 52]
    >>> models = [LongTailModel.for_labels(nn.Linear(3, 8), 8, ages) for _ in range(3)]
    >>> mean = ensemble(models)
    >>> x = torch.randn(4, 3)
    >>> each = torch.stack([model(x).distribution for model in models])
    >>> torch.allclose(mean(x).distribution, each.mean(0), atol=1e-6)
    True
    """
    instance((list, tuple, nn.ModuleList), models=models)
    require(len(models) > 0, "models must hold at least one LongTailModel", got="none")
    first: LongTailModel = models[0]
    for k, model in enumerate(models):
        instance(LongTailModel, **{f"models[{k}]": model})
        readout, fix = model.readout, "Take the mean of the predictions in place of this."
        sound = isinstance(readout, ScoreReadout) and getattr(readout, "residual", None) is None
        require(sound, f"models[{k}] must score bins, without residual", got=f"a {type(readout).__name__}", fix=fix)
        same_bins(f"models[{k}]", model, first.bins)
        other = [name for name, value in _learnt(model).items() if not np.array_equal(value, _learnt(first)[name])]
        rule, fix = (
            f"models[{k}] must have the {' and '.join(other)} of models[0]",
            "Train all on the same labels alike.",
        )
        require(not other, rule, got="another one", fix=fix)
    own = (*_OWN, "residual", "residual_weight")
    options: dict[str, Any] = {name: value for name, value in first.settings.items() if name not in own}
    options["density"] = first.density
    if first.readout.loss_name not in _SPREADING:  # which decides whether labels are spread
        options["loss"] = first.settings["loss"]
    members = Members(models)
    device = next(chain(first.parameters(), first.buffers())).device
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DirToolkitWarning)  # they were issued when the models were made
        return LongTailModel(members, members.num_features, head=nn.Identity(), **options).eval().to(device)


class Members(nn.Module):
    """The mean distribution of several models.

    Shape:
        forward: as for the models. Returns log-probabilities, (N, B) or (N, T, B).
    """

    def __init__(self, models: Sequence[LongTailModel]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.num_features = len(models[0].bins)

    def forward(self, x: Any) -> Tensor:
        models: Any = self.models
        logits = [model.readout.trained_logits(model(x).scores) for model in models]
        return torch.stack([one.log_softmax(-1) for one in logits]).logsumexp(0) - math.log(len(logits))


def _learnt(model: Any) -> dict[str, Any]:
    """What decides under which prior a model was trained, each as an array."""
    density, weights, readout = model.density, model.weights, model.readout
    return {
        "density": None if density is None else density.counts,
        "weights": None if weights is None else [*weights.bins.edges, *weights.table[:-1].tolist()],
        "sigma": getattr(readout, "sigma", None),
        "label_kernel": getattr(readout, "label_kernel", None),
    }
