"""Remedies for long-tailed classes on digits: all of them, and the studies of the affinity paper.

    python recipes/studies/digits.py --study imbalance                                     # scikit-learn's digits
    python recipes/studies/digits.py --data mnist --root DIR --study remedies --seeds 3    # real MNIST
    python recipes/studies/digits.py --methods softmax cosine+focal affinity-m2            # any methods

Runs lie in ``runs/mnist/<data>/<thinning>``, and the table, figures and report of a study beside them in
``<study>-<thinning>``. Studies share their runs: ``--resume`` uses what was trained before and continues what was
stopped. A training takes 12 seconds on digits and about a minute on a tenth of MNIST, on one core.
``digit_methods.py`` defines the methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import digit_methods
from command_line import parse, refuse, run, shown, typed_command
from digit_methods import METHODS

if TYPE_CHECKING:  # torch and the toolkit load within functions, so that --help answers at once
    from matplotlib.figure import Figure

    from dir_toolkit.experiment.study import Study, Task, Trained, Trial

COLUMNS = (("balanced_error", "all"), ("balanced_error", "few"), ("balanced_error", "many"), ("error", "all"))


@dataclass(frozen=True)
class Run(digit_methods.Run):
    """What is run, and where."""

    study: str | None = None
    """A whole study, by its name above, in place of --methods."""
    methods: tuple[str, ...] = ("softmax", "logit-adjusted", "affinity-m5")
    """The methods to train, by the names above."""


@dataclass(frozen=True)
class Settings(Run, digit_methods.Settings):
    """All settings."""


# ---- what a study keeps from each run, and the figures that it draws of all runs ----


def norms(trial: Trial, trained: Trained, output: Any) -> Any:
    """The length of each class's weights, if scores are linear in the features."""
    import dir_toolkit as dt

    head: Any = trained.model.head
    if not digit_methods.gives_logits(head) or trial.method.startswith("post-hoc"):  # which leaves them as they are
        return None
    scaled = isinstance(head, dt.heads.ScaledHead)
    weight = head.scale[:, None] * head.linear.weight if scaled else head.weight
    return weight.detach().norm(dim=1).cpu().numpy()


def draw_norms(study: Study) -> dict[str, Figure]:
    import numpy as np

    from dir_toolkit.experiment.results.digit_figures import norms_figure

    kept: dict[str, list[Any]] = {}
    for (_, name, _), one in study.runs.items():
        if one.extra is not None:
            kept.setdefault(name, []).append(one.extra)
    counts = study.trial(study.tasks[0], "softmax", 0).density.counts
    return {"Length of each class's weights": norms_figure({n: np.stack(rows) for n, rows in kept.items()}, counts)}


def by_seed(study: Study, region: str) -> dict[tuple[str, Task], list[float]]:
    """The balanced error in a region, of each seed, by method and task."""
    result: dict[tuple[str, Task], list[float]] = {}
    for (task, name, _), one in study.runs.items():
        result.setdefault((name, task), []).append(float(one.errors["balanced_error"].sel(region=region)))
    return result


def draw_curve(
    study: Study, x: Callable[[str, Task], float], xlabel: str, region: str, *, log_x: bool = False
) -> Figure:
    """The balanced error in a region against the varied setting, with one line per method or one for all affinities."""
    from dir_toolkit.experiment.results.digit_figures import study_figure

    curves: dict[str, dict[float, list[float]]] = {}
    for (name, task), errors in by_seed(study, region).items():
        curves.setdefault(name if len(study.tasks) > 1 else "affinity", {})[x(name, task)] = errors
    digits = {"few": "thinned digits", "all": "all digits"}[region]
    return study_figure(curves, xlabel=xlabel, ylabel=f"balanced error of {digits}", log_x=log_x)


def draw_imbalance(study: Study) -> dict[str, Figure]:
    def kept(name: str, task: Task) -> float:
        return float(task.folder.split("-")[1])

    xlabel = "share kept of the thinned digits"
    return {
        f"Balanced error of {digits} digits": draw_curve(study, kept, xlabel, region, log_x=True)
        for digits, region in (("the thinned", "few"), ("all", "all"))
    }


def draw_noise(study: Study) -> dict[str, Figure]:
    def noise(name: str, task: Task) -> float:
        return float(task.folder.partition("-noise-")[2].partition("-")[0] or 0)

    return {"Error under label noise": draw_curve(study, noise, "share of wrong training labels", "all")}


def draw_prototypes(study: Study) -> dict[str, Figure]:
    def count(name: str, task: Task) -> int:
        return METHODS[name].prototypes

    return {"Number of prototypes": draw_curve(study, count, "prototypes per class", "all")}


def draw_sigma(study: Study) -> dict[str, Figure]:
    def sigma(name: str, task: Task) -> float:
        return METHODS[name].sigma

    return {"Width of the similarity": draw_curve(study, sigma, "sigma", "all", log_x=True)}


def draw_similarity(study: Study) -> dict[str, Figure]:
    from dir_toolkit.experiment.results.digit_figures import bar_figure

    bars = {
        f"{METHODS[n].distance}, {METHODS[n].similarity}": errors for (n, _), errors in by_seed(study, "all").items()
    }
    return {"Distance and similarity": bar_figure(bars, ylabel="balanced error of all digits")}


def plane(trial: Trial, trained: Trained, output: Any) -> Any:
    """The features of the test images in the plane, as the head receives them, and the prototypes of the head."""
    import torch

    head: Any = trained.model.head
    points, places, owners = output.features.cpu(), None, None
    if METHODS[trial.method].head == "affinity":
        points, places = points * head.feature_scale.cpu(), head.weight.detach().cpu().flatten(0, 1)
        owners = torch.arange(10).repeat_interleave(METHODS[trial.method].prototypes)
    return points, trial.splits.test.labels, places, owners


def draw_plane(study: Study) -> dict[str, Figure]:
    from dir_toolkit.experiment.results.digit_figures import feature_space_figure

    panels = {name: run.extra for (_, name, seed), run in study.runs.items() if seed == 0}
    return {"Feature space of the test images": feature_space_figure(panels)}


def taus(trial: Trial, trained: Trained, output: Any) -> Any:
    """The reliability of the class probabilities; and for softmax, the score of every tau by three criteria."""
    import torch

    import dir_toolkit as dt
    from dir_toolkit.experiment.training.loop import predict
    from dir_toolkit.metrics.reliability import CalibrationMetrics

    val, test = (torch.from_numpy(part.labels) for part in (trial.splits.val, trial.splits.test))
    reliability = CalibrationMetrics(10)
    model: Any = trained.model
    reliability.update(model.readout.adjuster(output.scores).double().softmax(1).cpu(), test)
    if trial.method != "softmax":
        return reliability, None
    prior = dt.class_prior(trial.density)
    scores = predict(trained.model, trial.splits.val, runtime=trial.runtime).scores.cpu()
    return reliability, {
        "validation": dt.choose_tau(scores, val, prior),
        "test": dt.choose_tau(output.scores.cpu(), test, prior),
        "log-loss": dt.choose_tau(scores, val, prior, by="log_loss"),
    }


def draw_taus(study: Study) -> dict[str, Figure]:
    from dir_toolkit.experiment.results.class_figures import tau_figure
    from dir_toolkit.experiment.results.digit_figures import reliability_figure

    choices = {seed: run.extra[1] for (_, name, seed), run in study.runs.items() if name == "softmax"}

    def over_seeds(by: str, ylabel: str, **options: Any) -> Figure:
        # The curve of the test images is only for inspection, so its mark is the tau chosen on validation images.
        marked = "validation" if by == "test" else by
        curves = {f"seed {seed}": (choice[by].taus, choice[by].scores) for seed, choice in choices.items()}
        chosen = {f"seed {seed}": choice[marked].tau for seed, choice in choices.items()}
        return tau_figure(curves, chosen, ylabel=ylabel, **options)

    nats = "log-loss, every class alike (nats)"
    diagrams = {name: run.extra[0].reliability() for (_, name, seed), run in study.runs.items() if seed == 0}
    return {
        "Balanced error over tau on validation images": over_seeds("validation", "balanced error"),
        "Balanced error over tau on test images": over_seeds("test", "balanced error"),
        "Balanced log-loss over tau on validation images": over_seeds("log-loss", nats, percent=False),
        "Reliability on test images, seed 0": reliability_figure(diagrams),
    }


# ---- the studies ----


@dataclass(frozen=True)
class Plan:
    """One study."""

    title: str
    methods: tuple[str, ...]
    draw: Callable[[Study], dict[str, Figure]]
    keep: Callable[[Trial, Trained, Any], Any] | None = None
    retentions: tuple[float, ...] | None = None
    noises: tuple[float, ...] | None = None
    more: tuple[tuple[str, str | None], ...] = ()
    """Columns of the table beside the errors."""


STUDIES: Mapping[str, Plan] = {
    "remedies": Plan(
        "every remedy",
        (
            *("softmax", "balanced", "focal", "ldam-drw", "logit-adjusted", "equalized", "center", "affinity-m1"),
            *("affinity-m5", "post-hoc", "post-hoc-chosen", "tau-norm", "ncm", "crt", "lws"),
        ),
        draw_norms,
        norms,
    ),
    "imbalance": Plan(
        "fewer and fewer of the rare digits",
        ("softmax", "logit-adjusted", "affinity-m5"),
        draw_imbalance,
        retentions=(1.0, 0.5, 0.25, 0.1, 0.05, 0.025),
    ),
    "noise": Plan(
        "wrong labels; no digit is thinned",
        ("softmax", "affinity-m5"),
        draw_noise,
        retentions=(1.0,),
        noises=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5),
    ),
    "prototypes": Plan(
        "how many prototypes", tuple(f"affinity-m{count}" for count in digit_methods.PROTOTYPES), draw_prototypes
    ),
    "sigma": Plan(
        "how wide a similarity",
        tuple("affinity-m5" + f"-sigma{sigma:g}" * (sigma != 10) for sigma in digit_methods.SIGMAS),
        draw_sigma,
    ),
    "similarity": Plan(
        "which distance and similarity",
        ("affinity-m5", "affinity-m5-l2-inverse", "affinity-m5-l1-gaussian", "affinity-m5-l1-inverse"),
        draw_similarity,
    ),
    "features": Plan(
        "features of two dimensions", ("softmax-2d", "center-2d", "affinity-m1-2d", "affinity-m5-2d"), draw_plane, plane
    ),
    "tau": Plan(
        "strength of the adjustment, and calibration",
        ("softmax", "post-hoc", "post-hoc-chosen", "logit-adjusted"),
        draw_taus,
        taus,
        more=(("ece", None), ("log_loss", None), ("tau", None)),
    ),
    "decoupling": Plan(
        "frozen features, balanced heads",
        ("softmax", "ncm", "tau-norm", "crt", "lws", "balanced", "logit-adjusted"),
        draw_norms,
        norms,
    ),
}


def main(settings: Settings) -> None:
    from dir_toolkit.experiment.study import Study
    from dir_toolkit.experiment.training.runtime import start_runtime

    out = settings.out or Path("runs/mnist") / settings.data
    faults = digit_methods.faults(settings, out)
    if settings.study is not None and settings.study not in STUDIES:
        faults.append(f"--study must be one of {', '.join(STUDIES)}, got {settings.study}.")
    refuse("recipes/studies/digits.py", faults)
    plan = STUDIES.get(settings.study or "", Plan("comparison", settings.methods, lambda study: {}))
    retentions, noises = plan.retentions or (settings.retention,), plan.noises or (settings.noise,)
    tasks = [digit_methods.task(settings, retention, noise) for retention in retentions for noise in noises]
    with start_runtime(settings.device, settings.precision) as runtime:
        digit_methods.download(settings, runtime)
        study = Study(
            out,
            tasks,
            digit_methods.methods(settings, plan.methods),
            runtime,
            digit_methods.optimization(settings),
            settings=shown(settings),
            command=typed_command("recipes/studies/digits.py"),
            resume=settings.resume,
            checkpoint_minutes=settings.checkpoint_minutes,
        )
        study.run(plan.methods, seeds=settings.seeds, keep=plan.keep)
        data = tasks[0].folder if len(tasks) == 1 else settings.profile
        study.report(
            out / f"{settings.study or 'comparison'}-{data}",
            title=settings.study or "comparison",
            figures=plan.draw(study) if runtime.is_main and not study.failed else {},
            notes=digit_methods.notes(settings),
            columns=[*COLUMNS, *plan.more],
        )


if __name__ == "__main__":
    listed = "\n".join(f"  {name:14}{plan.title}: {', '.join(plan.methods)}" for name, plan in STUDIES.items())
    every = f"methods:\n  {', '.join(METHODS)}\n\nstudies:\n{listed}"
    run(main, parse(Settings, parts=(Run, *digit_methods.PARTS), description=f"{__doc__}\n\n{every}"))
