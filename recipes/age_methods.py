"""The methods that ``age.py`` trains and ``compare.py`` compares: what tells each of them from plain L1 regression.

A method is one line of ``METHODS``. ``network`` and ``objective`` turn it into a model and a loss.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor, nn

    import dir_toolkit as dt


@dataclass(frozen=True)
class Method:
    """One way to train and to predict; all defaults together are plain L1 regression."""

    title: str
    """In a few words."""
    head: Literal["regression", "gaussian", "linear", "cosine", "affinity"] = "regression"
    """Of ``LongTailModel``; all but the first two score bins of the label axis."""
    loss: str | None = None
    """Of ``LongTailModel`` by name, or one of ``objective``; None takes the setting for regression, else the head's."""
    hard: bool = False
    """Labels are not spread over neighbouring bins."""
    weights: Literal["counts", "smoothed"] | None = None
    """The density that samples are weighed by."""
    scheme: Literal["inverse"] | None = None
    """Of these weights, in place of the setting."""
    fds: Mapping[str, Any] | None = None
    """Features are smoothed, with these settings in place of the usual ones."""
    normalized: bool = False
    """Features pass a BatchNorm before they are smoothed and read."""
    bottleneck: bool = False
    """A layer of 32 features stands between the backbone and the head."""
    fds_before: bool = False
    """Features are smoothed before that layer, not after it."""
    in_loss: bool = False
    """The prior is adjusted in the loss, with tau 1."""
    q: float | None = None
    """Ages are drawn in proportion to their counts to this power."""
    start: str | None = None
    """The method whose trained network is taken over."""
    tau: bool = False
    """The network taken over is not trained again: predictions are adjusted, as validation finds best."""


MAIN: dict[str, Method] = {
    "vanilla": Method("plain regression"),
    "unsmoothed": Method("weights of the density as counted", weights="counts"),
    "lds": Method("label smoothing: weights of the smoothed density", weights="smoothed"),
    "fds": Method("feature smoothing", fds={}),
    "lds+fds": Method("label and feature smoothing", weights="smoothed", fds={}),
    "sampling": Method("ages drawn by the root of their counts", q=0.5),
    "rrt": Method(
        "frozen encoder of vanilla, regressor trained again with inverse weights",
        start="vanilla",
        weights="counts",
        scheme="inverse",
    ),
    "bmc": Method("balanced MSE over the batch", loss="bmc"),
    "gai": Method("balanced MSE with a Gaussian mixture", loss="gai"),
    "bni": Method("balanced MSE over bins", loss="balanced_mse"),
    "conr": Method("L1 and the contrastive regularizer ConR", loss="conr"),
    "rnc": Method("encoder by Rank-N-Contrast, regressor on what it gives", loss="rnc"),
    "nll": Method("Gaussian mean and variance", head="gaussian"),
    "bins": Method("hard bins of a year", head="linear", hard=True),
    "soft": Method("soft bins", head="linear"),
    "soft+cosine": Method("soft bins, cosine head", head="cosine"),
    "soft+affinity": Method("soft bins, Gaussian affinities to one prototype a bin", head="affinity"),
    "soft+emd": Method("bins, squared earth mover's distance", head="linear", loss="squared_emd"),
    "soft+crps": Method("bins, CRPS", head="linear", loss="crps"),
    "soft+in-loss": Method("soft bins, prior adjusted in the loss", head="linear", in_loss=True),
    "soft+tau": Method("soft bins, prior adjusted after training", start="soft", tau=True),
    "soft+fds": Method("soft bins, feature smoothing", head="linear", fds={}),
    "soft+lds": Method("soft bins, LDS weights", head="linear", weights="smoothed"),
    "soft+lds+tau": Method("soft bins, LDS weights, prior adjusted after training", start="soft+lds", tau=True),
    "soft+lds+fds": Method("soft bins, LDS weights, feature smoothing", head="linear", weights="smoothed", fds={}),
    "soft+crt": Method(
        "frozen encoder of soft bins, head trained again on even ages", head="linear", start="soft", q=0.0
    ),
}
"""All methods but variants."""

VARIANTS: dict[str, Method] = {
    "lds+fds-m0": Method("LDS and FDS of the last epoch's statistics alone", weights="smoothed", fds={"momentum": 0.0}),
    "lds+fds-shrunk": Method(
        "LDS and FDS, variances shrunk towards the pooled one", weights="smoothed", fds={"shrinkage": 20.0}
    ),
    "lds+fds-counts": Method(
        "LDS and FDS, smoothing weighted by counts", weights="smoothed", fds={"count_weighted": True}
    ),
    "lds+fds-wide": Method("LDS and FDS with a window of 15 years", weights="smoothed", fds={"kernel": (15, 6.0)}),
    "lds+fds-full": Method("LDS and FDS with full covariances", weights="smoothed", fds={"covariance": "full"}),
    "lds+fds-full-paper": Method(
        "the same, by the map that the paper writes", weights="smoothed", fds={"covariance": "full", "map": "paper"}
    ),
    "lds+fds-low-rank": Method(
        "LDS and FDS with covariances in 32 directions", weights="smoothed", fds={"covariance": "low_rank"}
    ),
    "lds-normalized": Method("LDS, features normalized", weights="smoothed", normalized=True),
    "lds+fds-normalized": Method(
        "LDS, features normalized, then smoothed", weights="smoothed", normalized=True, fds={}
    ),
    "lds-bottleneck": Method("LDS, a bottleneck of 32 features", weights="smoothed", bottleneck=True),
    "lds+fds-bottleneck": Method("LDS and FDS after that bottleneck", weights="smoothed", bottleneck=True, fds={}),
    "lds+fds-before-bottleneck": Method(
        "LDS and FDS before that bottleneck", weights="smoothed", bottleneck=True, fds={}, fds_before=True
    ),
}

METHODS = MAIN | VARIANTS

WINNER = "soft+tau"
"""The method that did best, as the README tells."""

GROUPS: dict[str, tuple[str, ...]] = {
    "default": (WINNER,),
    "all": tuple(MAIN),
    "fds-study": ("lds", "lds+fds", *VARIANTS, "soft+lds", "soft+lds+fds"),
}
"""Names that stand for several methods; the study asks whether, and how, feature smoothing adds to LDS or to bins."""


def named(methods: Sequence[str]) -> list[str]:
    """Methods by their own names, each once, where a name may stand for several."""
    return list(dict.fromkeys(name for method in methods for name in GROUPS.get(method, (method,))))


def unknown(option: str, methods: Sequence[str]) -> list[str]:
    """What is wrong with names that ``named`` does not know."""
    strange = [name for name in named(methods) if name not in METHODS]
    near = [difflib.get_close_matches(name, (*METHODS, *GROUPS), n=2) for name in strange]
    return [
        f"{option} must name methods that --help lists, got {name}."
        + f" Did you mean {' or '.join(close)}?" * bool(close)
        for name, close in zip(strange, near, strict=True)
    ]


def overview() -> str:
    """All methods and groups of them, for ``--help``."""

    def told(methods: Mapping[str, Method]) -> list[str]:
        return [f"  {name:26}{method.title}" for name, method in methods.items()]

    return "\n".join(
        [
            "methods; LDS and FDS are label and feature distribution smoothing (Yang et al. 2021):",
            *told(MAIN),
            "",
            "variants of lds and lds+fds:",
            *told(VARIANTS),
            "",
            "names that stand for several:",
            f"  {'default':26}{WINNER}, which did best of all",
            f"  {'all':26}all methods but the variants",
            f"  {'fds-study':26}the variants, and what they are compared with",
        ]
    )


def network(
    method: Method,
    backbone: nn.Module,
    bins: dt.Bins,
    density: dt.LabelDensity,
    *,
    regression_loss: str,
    sigma: float,
    smoother: Callable[[int], dt.FDS] | None,
    weights: dt.LDS | None = None,
) -> tuple[dt.LongTailModel, dt.FDS | None]:
    """A fresh model of a method, and the FDS in it.

    Args:
        regression_loss: of methods that do not name one.
        sigma: of labels spread over bins, in years.
        smoother: makes an FDS for so many features.
        weights: of the loss, which are a part of the prior that the model is trained under.
    """
    import numpy as np
    from torch import nn

    import dir_toolkit as dt

    num_features: Any = backbone.num_features
    body, fds = backbone, None
    if method.normalized:
        body = nn.Sequential(body, nn.BatchNorm1d(num_features, affine=False))
    if method.bottleneck:
        if smoother is not None and method.fds_before:
            fds = smoother(num_features)
            fds.attach(backbone, "output")
        body, num_features = nn.Sequential(body, nn.Linear(num_features, 32), nn.ReLU()), 32
    if smoother is not None and fds is None:
        fds = smoother(num_features)
    loss: Any = method.loss
    if loss == "bmc":
        loss = dt.BatchMCLoss(gather=True)
    elif loss == "gai":
        loss = dt.GaussianMixtureLoss.fit(np.repeat(bins.centers, density.counts))
    elif method.head == "regression" and loss != "balanced_mse":
        loss = regression_loss
    spreads = method.head not in ("regression", "gaussian") and loss != "crps"
    options: dict[str, Any] = {"sigma": None if method.hard else sigma} if spreads else {}
    if method.in_loss:
        options |= {"target_prior": "uniform", "adjust": "in_loss"}
    model = dt.LongTailModel(
        body,
        num_features,
        bins,
        density=density,
        head=method.head,
        loss=loss,
        fds=None if method.fds_before else fds,
        weights=weights,
        **options,
    )
    return model, fds


def objective(method: Method, model: dt.LongTailModel, density: dt.LabelDensity) -> Callable[..., Tensor]:
    """The loss of what the model returns for images."""
    import dir_toolkit as dt

    if method.loss == "conr":
        weights = dt.LDS(density.bins).fit(density)
        return dt.ConRLoss(coefficient=4.0, weights=weights)
    if method.loss == "rnc":

        def rank_and_probe(output: dt.LongTailOutput, labels: Tensor, weight: Tensor | None) -> Tensor:
            """The regressor reads features that its loss does not move, so that it is trained beside the encoder."""
            contrast = dt.rank_n_contrast(output.features, labels, weight)
            probe = model.read(output.features.detach())
            return contrast + model.criterion(probe, labels, weight)

        return rank_and_probe
    return model.criterion
