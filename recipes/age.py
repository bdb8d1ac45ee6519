"""Age estimation from faces: what remedies for long-tailed labels do to the errors of rare ages.

    python recipes/age.py                                             # synthetic portraits, no download
    python recipes/age.py --data utkface --root DIR --seeds 3         # real faces
    torchrun --nproc_per_node 2 recipes/age.py ...                    # several processes or GPUs

The first command takes about two minutes on two CPU cores. It ends with a table, figures, a report in
``runs/age/portraits``, and a sentence that says who won, by how much and at what price. The expected bMAE of vanilla,
lds and soft+tau is 10.9, 9.9 and 8.9 years, and their MAE at rare ages is 14.6, 11.8 and 10.8 years. ``--resume``
continues a run that was stopped and repeats nothing that was finished. ``recipes/studies/compare.py`` compares all
methods, ``recipes/studies/tune.py`` chooses the settings of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from command_line import parse, refuse, run, shown, typed_command, unfit_folder


@dataclass(frozen=True)
class Settings:
    data: Literal["portraits", "utkface"] = "portraits"
    """Faces: drawn by the package, or real ones in --root."""
    root: Path | None = None
    """Folder of the images of UTKFace, or its archive."""
    size: int | None = None
    """Side of the images in pixels; by default 32 for portraits and 64 for photographs."""
    methods: tuple[str, ...] = ("vanilla", "lds", "soft", "soft+tau")
    """The methods: vanilla, lds, fds, lds+fds, soft (soft bins) and soft+tau (the same, adjusted by the prior)."""
    seeds: int = 1
    """The number of seeds per method: 0, 1, ..."""
    epochs: int = 12
    """Passes over the training faces."""
    batch_size: int = 128
    """Faces per step, over all processes together."""
    lr: float = 2e-3
    """The highest learning rate."""
    kernel_sigma: float = 2.0
    """Standard deviation, in years, of the window of five years with which LDS and FDS smooth."""
    label_sigma: float = 2.0
    """How far soft bins spread a label over neighbouring ages, in years."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""
    precision: Literal["float32", "bf16"] = "float32"
    """The precision of the forward pass."""
    resume: bool = False
    """Continue an earlier run in --out that was stopped."""
    out: Path | None = None
    """Folder of all results; by default runs/age/<data>."""


if __name__ == "__main__":
    SETTINGS = parse(Settings)  # --help is answered here, before torch is loaded

import dir_toolkit as dt
from dir_toolkit.experiment.backbones import small_resnet
from dir_toolkit.experiment.data.images import Splits
from dir_toolkit.experiment.data.portraits import portraits
from dir_toolkit.experiment.data.utkface import utkface
from dir_toolkit.experiment.study import Study, Task, Trained, Trial
from dir_toolkit.experiment.training.loop import Optimization
from dir_toolkit.experiment.training.runtime import start_runtime


@cache
def faces(settings: Settings) -> Splits:
    """The splits, which are the same for all seeds."""
    if settings.root is None:
        return portraits(size=settings.size or 32)
    return utkface(settings.root, size=settings.size or 64)


def methods(settings: Settings) -> dict[str, Callable[[Trial], Trained]]:
    """Functions that train a network and return it. ``trial.model()`` makes a ``dt.LongTailModel`` with a new backbone
    and the density of the training labels, and ``trial.fit()`` calls ``dir_toolkit.experiment.training.loop.fit``."""
    window = dt.gaussian(5, settings.kernel_sigma)

    def regression(trial: Trial, *, lds: bool = False, fds: bool = False) -> Trained:
        weights = dt.LDS(trial.bins, kernel=window).fit(trial.density) if lds else None
        smoother = dt.FDS(trial.bins, 128, kernel=window) if fds else None
        return trial.fit(trial.model(head="regression", weights=weights, fds=smoother))

    return {
        "vanilla": regression,
        "lds": lambda trial: regression(trial, lds=True),
        "fds": lambda trial: regression(trial, fds=True),
        "lds+fds": lambda trial: regression(trial, lds=True, fds=True),
        "soft": lambda trial: trial.fit(trial.model(sigma=settings.label_sigma)),
        # The epoch with the least error before the adjustment need not have the least after it, so the last is taken.
        "soft+tau": lambda trial: trial.adjusted(trial.trained("soft", epoch="last")),
    }


TITLES = {
    "vanilla": "plain L1 regression",
    "lds": "L1 regression weighted by label distribution smoothing (LDS, Yang et al. 2021)",
    "fds": "feature distribution smoothing over ages (FDS, Yang et al. 2021)",
    "lds+fds": "LDS and FDS together",
    "soft": "bins of one year, with labels spread over neighbouring bins, before any adjustment",
    "soft+tau": "the network of soft after its last epoch, adjusted by the prior as is best on validation data",
}
NOTES = (
    "Ages fall into regions by their training faces: many (more than 100 per age), medium (20 to 100), few (1 to 19). "
    "MAE is the mean over faces, bMAE the mean over ages of the MAE of each age.",
    "Each run is judged at the epoch of its least validation bMAE. A method that starts from the network of another "
    "takes it as it was after its last epoch. The test set was used once, at the end.",
)


def main(settings: Settings) -> None:
    out = settings.out or Path("runs/age") / settings.data
    faults = unfit_folder("--out", out)
    if (settings.data == "portraits") != (settings.root is None):
        faults.append(
            "--root must name the folder of the images of utkface, as its data card says; portraits are drawn."
        )
    refuse("recipes/age.py", faults)
    with start_runtime(settings.device, settings.precision) as runtime:
        task = Task(
            data=lambda seed: faces(settings),
            bins=dt.Bins.uniform(0, 101 if settings.data == "portraits" else 117, width=1, integer=True),
            network=lambda _: small_resnet(),
            title=f"Age estimation on {settings.data}",
            label_name="age",
            label_units="years",
        )
        study = Study(
            out,
            task,
            methods(settings),
            runtime,
            Optimization(epochs=settings.epochs, batch_size=settings.batch_size, lr=settings.lr),
            settings=shown(settings),
            command=typed_command("recipes/age.py"),
            resume=settings.resume,
        )
        study.run(settings.methods, seeds=settings.seeds)
        study.report(title="methods", notes=NOTES, titles={name: TITLES[name] for name in settings.methods})


if __name__ == "__main__":
    run(main, SETTINGS)
