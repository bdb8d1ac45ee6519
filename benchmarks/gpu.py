"""What a GPU makes of this package, in absolute times: the stages of gpu.sh, which runs them with time limits.

    benchmarks/gpu.sh                                          # all, at most six minutes on one GPU
    python benchmarks/gpu.py parts --out runs/gpu              # FDS, LDS, heads and losses
    python benchmarks/gpu.py step --out runs/gpu               # a training step of a ResNet-18 with and without FDS
    python benchmarks/gpu.py age --out runs/gpu                # the age recipe on portraits, against the CPU
    python benchmarks/gpu.py table --out runs/gpu              # one table of all that was measured

``--device cpu --tiny`` runs the same on a few numbers, to see that it runs. No figure of an accelerator is published
yet.
"""

from __future__ import annotations

import argparse
import csv
import math
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from all import as_markdown
from fds import Training, paired
from timing import Report, Row, medians
from torch import Tensor, nn

import dir_toolkit as dt
from dir_toolkit.experiment.backbones import timm_backbone

NUM_BINS, NUM_FEATURES = 100, 512
BINS = dt.Bins.uniform(0, NUM_BINS, width=1)
FIELDS = ("what", "value", "unit", "detail")


class KeptReport(Report):
    """Writes each row as it comes, so that a stage that ends early keeps what it measured."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        path.write_text(",".join(FIELDS) + "\n", encoding="utf-8")

    def add(self, what: str, value: float, goal: str = "", detail: str = "", *, unit: str = "x") -> None:
        super().add(what, value, goal, detail, unit=unit)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow([what, value, unit, detail])


def seconds_of(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median time of a call, on a GPU by its own clock."""
    if device.type != "cuda":
        return medians({"": function}, repeats=repeats)[""]
    times = []
    for _ in range(3 + repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[3:])


def backward(function: Callable[[Tensor], Tensor], start: Tensor) -> Callable[[], None]:
    """Forward and backward to the input."""

    def step() -> None:
        leaf = start.detach().requires_grad_()
        result = function(leaf)
        result.backward(torch.ones_like(result))

    return step


def pieces(rows: int, device: torch.device) -> dict[str, tuple[Callable[[], object], int]]:
    """Each with how many numbers of four bytes it reads and writes at least."""
    torch.manual_seed(0)
    features = torch.randn(rows, NUM_FEATURES, device=device)
    labels = NUM_BINS * torch.rand(rows, device=device)
    classes = BINS.index(labels)
    scores = torch.randn(rows, NUM_BINS, device=device)
    density = dt.LabelDensity.count(labels, BINS)
    lds, prior = dt.LDS(BINS).fit(density).to(device), dt.class_prior(density).to(device)
    weight, soft = lds(labels), dt.soft_labels(labels, BINS, 2.0)
    fds = dt.FDS(BINS, NUM_FEATURES).to(device)
    for _ in range(2):
        fds.update(features, labels)
        fds.end_epoch()
    place = nn.Identity()
    fds.attach(place, "output")

    def hook() -> Tensor:
        with fds.labels(labels):
            return place(features)

    of_features, of_scores = rows * NUM_FEATURES, rows * NUM_BINS
    result: dict[str, tuple[Callable[[], object], int]] = {
        "FDS, calibration": (lambda: fds.calibrate(features, labels), 2 * of_features),
        "FDS, calibration and statistics": (hook, 2 * of_features),
        "LDS, weights of labels": (lambda: lds(labels), 2 * rows),
        "soft labels": (lambda: dt.soft_labels(labels, BINS, 2.0), rows + of_scores),
    }
    for name in ("LinearHead", "CosineHead", "AffinityHead", "CoralHead", "CornHead"):
        head = getattr(dt.heads, name)(NUM_FEATURES, NUM_BINS).to(device)
        result[f"{name}, forward and backward"] = backward(head, features), 2 * (of_features + of_scores)
    losses: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
        "weighted_l1": (lambda x: dt.weighted_l1(x, labels, weight), labels + 1),
        "weighted_huber": (lambda x: dt.losses.weighted_huber(x, labels, weight), labels + 1),
        "gaussian_nll": (lambda x: dt.losses.gaussian_nll(x, labels), torch.stack([labels + 1, labels], 1)),
        "crps": (lambda x: dt.crps(x, labels, bins=BINS), scores),
        "soft_cross_entropy": (lambda x: dt.soft_cross_entropy(x, soft), scores),
        "squared_emd": (lambda x: dt.losses.squared_emd(x, soft, bins=BINS), scores),
        "cross_entropy": (lambda x: dt.losses.cross_entropy(x, classes), scores),
        "logit_adjusted_cross_entropy": (lambda x: dt.logit_adjusted_cross_entropy(x, classes, prior), scores),
        "focal_loss": (lambda x: dt.losses.focal_loss(x, classes), scores),
    }
    for name, (loss, start) in losses.items():
        result[f"{name}, forward and backward"] = backward(loss, start), 3 * start.numel()
    return result


def parts(report: Report, device: torch.device, tiny: bool) -> None:
    """FDS, LDS, heads and losses, each as a time and as a share of the bandwidth of a copy."""
    repeats = 3 if tiny else 30
    source = torch.zeros(2**16 if tiny else 2**27, device=device)
    target = torch.empty_like(source)
    bandwidth = 8 * source.numel() / seconds_of(lambda: target.copy_(source), device, repeats)
    report.add(
        f"copy of {4 * source.numel() / 2**20:.0f} MiB: bytes read and written per second", bandwidth / 1e9, unit="GB/s"
    )
    for rows in (8, 64) if tiny else (256, 65_536):
        for name, (function, numbers) in pieces(rows, device).items():
            seconds = seconds_of(function, device, repeats)
            report.add(f"{name}, {rows} rows: time", 1e6 * seconds, unit="µs")
            share = 400 * numbers / seconds / bandwidth
            report.add(f"{name}, {rows} rows: share of the bandwidth of the copy", share, unit="%")


def resnet18() -> tuple[nn.Module, str] | None:
    """The network and whose it is, with random weights, or None where neither library is installed."""
    try:
        import torchvision
    except ImportError:
        try:
            return timm_backbone("resnet18", pretrained=False), "timm"
        except ImportError:
            return None
    network = torchvision.models.resnet18(weights=None)
    network.fc = nn.Identity()
    return network, "torchvision"


def step(report: Report, device: torch.device, tiny: bool) -> None:
    """A training step of a ResNet-18 in bf16, with and without FDS, eager and compiled."""
    batch, size, steps, pairs = (4, 32, 2, 1) if tiny else (256, 64, 8, 7)
    made = resnet18()
    if made is None:
        report.add("ResNet-18 step: skipped, since neither torchvision nor timm is installed", math.nan, unit="")
        return
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch * steps, 3, size, size, generator=generator).to(device)
    labels = torch.randint(0, NUM_BINS, (batch * steps,), generator=generator).float().to(device)
    for compiled in (False, True):
        if compiled and tiny:
            continue
        trainings, peaks = {}, {}
        for form in (None, "diagonal"):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            backbone, _ = resnet18() or made
            trainings[form] = Training(form, images, labels, batch, compiled=compiled, backbone=backbone, bf16=True)
            peaks[form] = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else math.nan
        seconds = paired(trainings, pairs)
        where = f"{made[1]}'s ResNet-18, {batch} images of {size} px, bf16{', compiled' * compiled}"
        for form in trainings:
            name = "with FDS" if form else "without FDS"
            report.add(f"step {name}, {where}", 1e3 * statistics.median(seconds[form]) / steps, unit="ms")
            report.add(f"peak memory {name}, {where}", peaks[form], unit="MiB")
        ratios = [a / b for a, b in zip(seconds["diagonal"], seconds[None], strict=True)]
        detail = f"median of {pairs} pairs, which lie between {min(ratios):.3f} and {max(ratios):.3f}"
        report.add(f"step with / without FDS, {where}", statistics.median(ratios), "", detail)


def age(report: Report, device: torch.device, tiny: bool, words: Sequence[str] = ()) -> None:
    """The age recipe on portraits: all of it on the device, then two epochs of one method on the CPU."""
    recipe, out = Path(__file__).parents[1] / "recipes" / "age.py", report.path.parent  # type: ignore[attr-defined]
    short = ["--methods", "vanilla", "--epochs", "2"]
    per_epoch = {}
    runs = {device.type: short if tiny else [], "cpu": short}
    for kind, more in runs.items():
        folder = out / f"age-{kind}{'-tiny' * tiny}"
        start = time.perf_counter()
        command = [sys.executable, str(recipe), "--device", kind, "--out", str(folder), *more, *words]
        subprocess.run(command, check=True)
        what = "recipes/age.py" + "".join(f" {word}" for word in more)
        report.add(f"{what} on {kind}, with figures and report", time.perf_counter() - start, unit="s")
        history, *_ = sorted(folder.glob("**/vanilla*/**/history.csv"))
        with history.open(encoding="utf-8") as file:
            per_epoch[kind] = min(float(row["seconds"]) for row in csv.DictReader(file))
        report.add(f"fastest epoch of vanilla on {kind}", per_epoch[kind], unit="s")
    report.add(f"fastest epoch, cpu / {device.type}", per_epoch["cpu"] / per_epoch[device.type])


STAGES = {"parts": parts, "step": step, "age": age}


def table(out: Path, device: torch.device) -> None:
    """All rows as gpu.md and gpu.csv, with how each stage ended."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    rows: dict[str, list[Row]] = {}
    for stage in ("stages", *STAGES):
        path = out / f"{stage}.csv"
        if path.exists():
            with path.open(encoding="utf-8") as file:
                read = list(csv.DictReader(file))
            rows[stage] = [Row(r["what"], float(r["value"]), r["unit"], detail=r["detail"]) for r in read]
    tests = (out / "tests.txt").read_text(encoding="utf-8").strip() if (out / "tests.txt").exists() else ""
    machine = f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}"
    machine += f"\n\nTests: {tests.splitlines()[-1].strip('= ') if tests else 'none'}"
    (out / "gpu.md").write_text(as_markdown(rows, machine), encoding="utf-8")
    with (out / "gpu.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["stage", *FIELDS])
        writer.writerows([stage, r.what, r.value, r.unit, r.detail] for stage, those in rows.items() for r in those)
    print(as_markdown(rows, machine))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "table"])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    device = torch.device(given.device)
    warnings.simplefilter("ignore", dt.DirToolkitWarning)  # that batches repeat and no epoch ends
    given.out.mkdir(parents=True, exist_ok=True)
    if given.stage == "table":
        table(given.out, device)
    else:
        STAGES[given.stage](KeptReport(given.out / f"{given.stage}.csv"), device, given.tiny)


if __name__ == "__main__":
    main()
