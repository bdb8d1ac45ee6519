"""What an affinity head costs, as ratios within one run.

    python benchmarks/heads.py

Prints time and peak memory of forward and backward through an affinity head of 1,000 classes with 5 prototypes each,
against a linear head of 5,000 outputs, and against affinities by broadcast differences; and of the other heads against
a linear one. Takes half a minute on two CPU cores. The broadcast form runs on a smaller batch: on the whole one its
differences alone would take 2.6 GB, and autograd holds several times as much.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from timing import Report, medians, milliseconds
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from dir_toolkit.heads.affinity import AffinityHead
from dir_toolkit.heads.cosine import CosineHead
from dir_toolkit.heads.linear import LinearHead
from dir_toolkit.heads.nearest_mean import NearestMeanHead
from dir_toolkit.heads.normalized import ScaledHead

BATCH, NUM_FEATURES, NUM_CLASSES, PROTOTYPES = 256, 512, 1000, 5
SMALL_BATCH = 32


class BroadcastAffinity(nn.Module):
    """The affinity head's scores by the formula: every difference of a feature and a prototype."""

    def __init__(self, head: AffinityHead) -> None:
        super().__init__()
        self.weight = nn.Parameter(head.weight.detach().clone())
        self.scale, self.sigma = head.feature_scale, head.sigma

    def forward(self, features: Tensor) -> Tensor:
        differences = (self.scale * features)[:, None, None] - self.weight  # (N, C, m, D)
        return torch.exp(-differences.square().sum(3) / self.sigma).amax(2)


class Step:
    """Forward and backward, to features and parameters, of one head; the loss is a fixed weighted sum of scores."""

    def __init__(self, head: nn.Module, num_scores: int, batch: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.head = head
        self.features = torch.randn(batch, NUM_FEATURES, generator=generator).requires_grad_()
        self.fixed = torch.randn(batch, num_scores, generator=generator)

    def __call__(self) -> None:
        self.forget()
        torch.dot(self.head(self.features).flatten(), self.fixed.flatten()).backward()

    def forget(self) -> None:
        self.features.grad = None
        self.head.zero_grad()

    def held(self) -> int:
        """Bytes there before the step: parameters, features and the loss's weights."""
        tensors = [self.features, self.fixed, *self.head.parameters()]
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def peak_bytes(step: Step) -> int:
    """The most bytes allocated at one time in a step, beyond those there before, as torch's profiler saw them."""
    step.forget()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(os.fspath(path))
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    if not events:
        raise RuntimeError("peak_bytes: the profiler saw no allocation")
    events.sort(key=lambda event: event["ts"])
    now = most = 0
    for event in events:
        now += event["args"]["Bytes"]
        most = max(most, now)
    return most


def compare(
    report: Report, first: str, second: str, steps: dict[str, Step], *, repeats: int, goals: tuple[str, str] = ("", "")
) -> None:
    runs: dict[str, Callable[[], object]] = dict(steps)
    times = medians(runs, repeats=repeats)
    held = {name: step.held() for name, step in steps.items()}
    peaks = {name: peak_bytes(step) for name, step in steps.items()}
    whole = {name: held[name] + peaks[name] for name in steps}
    detail = ", ".join(f"{name} {held[name] / 2**20:.1f} + {peaks[name] / 2**20:.1f} MiB" for name in steps)
    what = f"{first} / {second}, batch {len(steps[first].features)}"
    report.add(f"{what}: time", times[first] / times[second], goals[0], milliseconds(times))
    report.add(f"{what}: peak memory beyond what is held", peaks[first] / peaks[second], goals[1], detail)
    report.add(f"{what}: peak memory with parameters", whole[first] / whole[second], goals[1])


def main(report: Report) -> None:
    torch.manual_seed(0)
    outputs = NUM_CLASSES * PROTOTYPES
    affinity = AffinityHead(NUM_FEATURES, NUM_CLASSES, PROTOTYPES)
    steps = {
        "affinity head": Step(affinity, NUM_CLASSES, BATCH),
        "linear head": Step(LinearHead(NUM_FEATURES, outputs), outputs, BATCH),
    }
    compare(report, "affinity head", "linear head", steps, repeats=50, goals=("<= 1.3", "<= 1.2"))

    broadcast = BroadcastAffinity(affinity)
    steps = {
        "affinities by broadcast": Step(broadcast, NUM_CLASSES, SMALL_BATCH),
        "affinity head": Step(affinity, NUM_CLASSES, SMALL_BATCH),
    }
    with torch.no_grad():
        features = steps["affinity head"].features
        torch.testing.assert_close(affinity(features), broadcast(features), rtol=1e-4, atol=1e-6)
    compare(report, "affinities by broadcast", "affinity head", steps, repeats=7)

    means = NearestMeanHead(NUM_FEATURES, NUM_CLASSES)
    means.update(torch.randn(4 * NUM_CLASSES, NUM_FEATURES), torch.arange(NUM_CLASSES).repeat(4))
    means.finish()
    others = {
        "cosine head": CosineHead(NUM_FEATURES, NUM_CLASSES),
        "scaled head": ScaledHead(nn.Linear(NUM_FEATURES, NUM_CLASSES)),
        "nearest-mean head": means,
    }
    for name, head in others.items():
        linear = Step(LinearHead(NUM_FEATURES, NUM_CLASSES), NUM_CLASSES, BATCH)
        compare(report, name, "linear head", {name: Step(head, NUM_CLASSES, BATCH), "linear head": linear}, repeats=50)


if __name__ == "__main__":
    main(Report())
