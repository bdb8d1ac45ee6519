"""What ``age.py --tune`` chooses from, which methods that concerns, and how the choice is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from age_methods import METHODS, Method, named

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dir_toolkit.experiment.training.search import Search

TUNABLE: dict[str, tuple[dict[str, Any], ...]] = {
    "kernel": tuple(
        {"kernel_size": n, "kernel_sigma": sigma} for n, sigma in ((3, 1.0), (5, 2.0), (9, 4.0), (15, 6.0))
    ),
    "sigma": tuple({"label_sigma": sigma} for sigma in (1.0, 2.0, 3.0, 5.0)),
    "scheme": tuple({"scheme": scheme} for scheme in ("inverse", "sqrt_inverse", "effective_number", "dense")),
    "momentum": tuple({"fds_momentum": momentum} for momentum in (0.0, 0.5, 0.9)),
    "lr": tuple({"lr": lr} for lr in (1e-3, 2e-3, 4e-3)),
}
"""What is tried, by name: settings that go together."""


def knobs(tune: str) -> list[str]:
    """What is to be chosen."""
    return [knob.strip() for knob in tune.split(",") if knob.strip()]


def moved(knob: str, methods: Sequence[str]) -> bool:
    """Whether what a knob sets decides how one of the methods, or of those they start from, is trained."""
    names: list[Any] = list(named(methods))
    for name in names:  # which grows meanwhile
        names += [METHODS[name].start] if METHODS[name].start else []

    def smooths(method: Method, unless: str) -> bool:
        return method.fds is not None and unless not in method.fds

    used: dict[str, Callable[[Method], bool]] = {
        "kernel": lambda method: method.weights == "smoothed" or smooths(method, "kernel"),
        "sigma": lambda method: (
            method.head not in ("regression", "gaussian") and method.loss != "crps" and not method.hard
        ),
        "scheme": lambda method: method.weights is not None and method.scheme is None,
        "momentum": lambda method: smooths(method, "momentum"),
        "lr": lambda method: True,
    }
    return any(used[knob](METHODS[name]) for name in names)


def chosen(search: Search) -> str:
    """What a search found, in a sentence."""
    best = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in search.settings.items())
    return f"Chosen on validation from {len(search.study.trials)} settings: {best}."


def curves(search: Search) -> Figure:
    """How the settings that were tried did."""
    from dir_toolkit.experiment.training.search import search_figure

    return search_figure(search, score_name="validation bMAE (years)")
