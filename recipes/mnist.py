"""Long-tailed digits: what a margin and an adjustment by the prior do to the errors of rare classes.

    python recipes/mnist.py                                                # scikit-learn's digits, no download
    python recipes/mnist.py --data mnist --root DIR --download --seeds 3   # real MNIST

The first command takes about 12 seconds on two CPU cores, and ends with a table, figures and a report in
``runs/mnist/digits``. The digits 0 to 4 are thinned to a tenth, and test and validation images are balanced.
The expected balanced errors of softmax, logit-adjusted and affinity are 7.6, 6.6 and 8.6 %, of 500 images and one seed.
No difference exceeds noise then; ``--seeds 5`` tells more. ``recipes/studies/digits.py`` has all remedies.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from command_line import parse, refuse, run, shown, typed_command, unfit_folder


@dataclass(frozen=True)
class Settings:
    data: Literal["digits", "mnist"] = "digits"
    """Digits of 8x8 pixels that come with scikit-learn, or the files of MNIST in --root."""
    root: Path | None = None
    """Folder of the four idx files of MNIST, packed or not."""
    download: bool = False
    """Fetch the files of MNIST into --root first, where they are missing."""
    methods: tuple[str, ...] = ("softmax", "logit-adjusted", "affinity")
    """The methods to train: softmax, logit-adjusted, affinity, post-hoc (softmax, adjusted by the prior afterwards)."""
    retention: float = 0.1
    """Share kept of the digits 0 to 4, in (0, 1]."""
    train_per_class: int | None = None
    """Images per digit of MNIST before any is thinned; by default all."""
    seeds: int = 1
    """The number of seeds: 0, 1, ... A seed decides the network, the order, and which images are kept."""
    epochs: int | None = None
    """Passes over the training images; by default 40 for digits and 15 for MNIST."""
    batch_size: int | None = None
    """Images per step, over all processes together; by default 32 for digits and 128 for MNIST."""
    lr: float = 0.05
    """The highest learning rate."""
    tau: float = 1.0
    """Strength of the adjustment in the loss."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""
    resume: bool = False
    """Continue an earlier run in --out that was stopped."""
    out: Path | None = None
    """Folder of all results; by default runs/mnist/<data>."""


if __name__ == "__main__":
    SETTINGS = parse(Settings)  # --help is answered here, before torch is loaded

import dir_toolkit as dt
from dir_toolkit.experiment.backbones import digit_cnn
from dir_toolkit.experiment.data.digits import digits
from dir_toolkit.experiment.data.images import Splits
from dir_toolkit.experiment.data.long_tail import step_profile
from dir_toolkit.experiment.data.mnist import download_mnist, mnist
from dir_toolkit.experiment.study import Study, Task, Trained, Trial
from dir_toolkit.experiment.training.loop import Optimization
from dir_toolkit.experiment.training.runtime import start_runtime

BINS = dt.Bins.classes(10)
NOTES = [
    "Balanced error is the mean over digits of the share of wrong answers; few: over the digits 0 to 4, which are "
    "thinned; many: over 5 to 9. The best epoch, and tau after training, follow from the balanced error on clean, "
    "balanced validation images. The test set was used once, at the end."
]
TITLES = {
    "softmax": "cross-entropy",
    "logit-adjusted": "cross-entropy of logits to which the log-shares of the classes are added (Menon et al. 2021)",
    "affinity": "affinities to five prototypes per class, with a margin (Hayat et al. 2019)",
    "post-hoc": "the network of softmax, adjusted by the training prior as far as is best on validation data",
}
COLUMNS = [("balanced_error", "all"), ("balanced_error", "few"), ("balanced_error", "many"), ("error", "all")]


def load(settings: Settings, seed: int) -> Splits:
    """The splits of a seed. Validation images are held out before any digit is thinned."""
    shares = step_profile(10, settings.retention, thinned=range(5))
    if settings.root is None:
        return digits(shares=shares, seed=seed)
    return mnist(settings.root, shares=shares, train_per_class=settings.train_per_class, val_per_class=200, seed=seed)


def metrics(density: dt.LabelDensity) -> dt.ClassificationMetrics:
    """Metrics in which the thinned digits are the region "few" and the others "many", whatever their counts are."""
    return dt.ClassificationMetrics(density, regions=["few"] * 5 + ["many"] * 5)


def affinity(trial: Trial) -> Trained:
    """A network with the affinity head. ``trial.model()`` makes a ``dt.LongTailModel`` with the density of the training
    labels, and ``trial.fit()`` calls ``dir_toolkit.experiment.training.loop.fit``."""
    backbone = trial.network()
    head = dt.AffinityHead(128, 10, prototypes=5, sigma=10.0, feature_scale=1.0)  # as the paper has them
    return trial.fit(trial.model(backbone, head=head))


def main(settings: Settings) -> None:
    out = settings.out or Path("runs/mnist") / settings.data
    faults = unfit_folder("--out", out)
    if (settings.data == "digits") != (settings.root is None):
        faults.append("--root must name the folder of the files of --data mnist; digits come with scikit-learn.")
    if not 0 < settings.retention <= 1:
        faults.append(f"--retention must be above 0 and at most 1, got {settings.retention:g}.")
    refuse("recipes/mnist.py", faults)
    methods = {
        "softmax": lambda trial: trial.fit(trial.model()),
        "logit-adjusted": lambda trial: trial.fit(
            trial.model(target_prior="uniform", adjust="in_loss", tau=settings.tau)
        ),
        "affinity": affinity,
        "post-hoc": lambda trial: trial.adjusted(trial.trained("softmax")),
    }
    small = settings.data == "digits"
    budget = Optimization(
        epochs=settings.epochs or (40 if small else 15),
        batch_size=settings.batch_size or (32 if small else 128),
        lr=settings.lr,
        optimizer="sgd",
        weight_decay=5e-4,
        clip_norm=5.0,
    )
    with start_runtime(settings.device) as runtime:
        if settings.download and settings.root is not None and runtime.is_main:
            download_mnist(settings.root)
        runtime.barrier()
        task = Task(
            data=lambda seed: load(settings, seed),
            bins=BINS,
            network=lambda splits: digit_cnn(128, size=splits.train.inputs.shape[2]),
            title=f"Long-tailed {settings.data}",
            label_name="digit",
            metrics=metrics,
            augmentation=False,
        )
        made_by: dict[str, Any] = {"settings": shown(settings), "command": typed_command("recipes/mnist.py")}
        study = Study(out, task, methods, runtime, budget, resume=settings.resume, **made_by)
        study.run(settings.methods, seeds=settings.seeds)
        study.report(
            title="comparison", notes=NOTES, columns=COLUMNS, titles={name: TITLES[name] for name in settings.methods}
        )


if __name__ == "__main__":
    run(main, SETTINGS)
