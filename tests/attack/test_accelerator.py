"""Training steps on an accelerator that is not there: nothing makes the host wait for it, and no devices are mixed.

Fake tensors have a device and a shape, and no numbers: whatever asks for one fails, and a watch counts what else stops
a real accelerator. Each job is first run on the CPU, with numbers, so that what a first step looks at is known.
Autograd wants a device that exists, so that whole steps run in a process of their own, on a device made up in Python.
Where torch cannot make one up, forward passes alone run on fake CUDA in this process.
"""

from __future__ import annotations

import functools
import pkgutil
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any, get_args

import pytest
import torch
import torch.utils.backend_registration
from forked import Forked
from jobs import (
    HEADS,
    JOBS,
    LOSSES,
    METRICS,
    MODELS,
    NO_LOSSES,
    C,
    Data,
    Job,
    N,
    alone,
    batch,
    fds_job,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import dir_toolkit as dt
from dir_toolkit.labels import bins as bins_module
from dir_toolkit.longtail.model import HeadName

# The watch

_WAITS = {
    *("_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select", "bincount", "histc"),
    *("_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive", "repeat_interleave"),
    *("_linalg_eigh", "linalg_cholesky", "_linalg_svd", "linalg_inv", "linalg_solve", "linalg_eig", "linalg_lstsq"),
}


_ONCE = ("a copy", "a tensor")  # may be made once, and kept


class Watch(TorchDispatchMode):
    """Names what makes the host wait for the device, or copies between the two."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.kind, self.seen = device, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        given = [leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = any(t.device.type == self.kind for t in given)
        if there and name in _WAITS:
            self.note(name)
        if (
            name in ("index", "index_put_")
            and there
            and any(t.dtype in (torch.bool, torch.uint8) for t in args[1] if t is not None)
        ):
            self.note("indexing by a mask")
        if there and name != "copy_" and any(t.device.type == "cpu" for t in given):
            self.note("two devices in one operation")
        result = func(*args, **kwargs)
        if name in ("_to_copy", "copy_", "_copy_from", "to") and given:
            source = given[1] if name == "copy_" else given[0]
            if isinstance(result, Tensor) and source.device.type != result.device.type:
                self.note(f"a copy from {source.device.type} to {result.device.type}")
        return result

    def note(self, what: str) -> None:
        own = [frame for frame in traceback.extract_stack() if "/dir_toolkit/" in frame.filename]
        spot = f" at {own[-1].filename.rsplit('/dir_toolkit/', 1)[1]}:{own[-1].lineno}" if own else ""
        self.seen.add(what + spot)


class Fakes(FakeTensorMode):
    avoid_device_init = True  # what is sent from the CPU to the device is not computed on the way


@functools.cache
def fakes() -> Fakes:
    return Fakes(allow_non_fake_inputs=True)


class Asking(TorchFunctionMode):
    """Tells the watch of tensors that are made of Python's numbers on the device, which copies them there."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = func in (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
        if made and result.device.type == self.watch.kind and not (args and isinstance(args[0], Tensor)):
            self.watch.note("a tensor of Python's numbers")
        return result


def watched(job: Callable[[], Job], device: str, *, backward: bool) -> list[str]:
    """What made the host wait in two steps of a job on the device, or the error that ended it; but for copies that
    only the first one made."""
    torch.manual_seed(0)
    modules, step = job()

    def whole_step(d: Data) -> None:
        loss = step(d)
        if isinstance(loss, Tensor):
            assert loss.requires_grad
            assert loss.ndim == 0
            if backward or d.x.device.type == "cpu":
                loss.backward()

    numbers = batch()
    whole_step(Data(**numbers))
    for module in modules:
        module.zero_grad()
    with fakes():
        for module in modules:
            module.to(device)
        there = {k: v.detach().to(device).requires_grad_(v.requires_grad) for k, v in numbers.items()}
        watch = Watch(device)
        try:
            with watch, Asking(watch):
                whole_step(Data(**there))
                watch.seen = {what for what in watch.seen if not what.startswith(_ONCE)}
                whole_step(Data(**there))
        except Exception as error:
            own = [f for f in traceback.extract_tb(error.__traceback__) if "/dir_toolkit/" in f.filename]
            spot = f"{own[-1].filename.rsplit('/dir_toolkit/', 1)[1]}:{own[-1].lineno}" if own else "the test"
            watch.seen.add(f"{type(error).__name__} at {spot}: {str(error)[:200]}")
    return sorted(watch.seen)


@pytest.fixture(autouse=True)
def _fakes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As tensors of a real accelerator are, since a copy in each step would hide what else is copied."""
    monkeypatch.setattr(bins_module, "keepable", lambda tensor: True)


@pytest.fixture(scope="module")
def whole_steps() -> dict[str, list[str]] | None:
    """What made the host wait in whole steps of each job, or None where this torch cannot make up a device."""
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        return None
    (seen,) = Forked(__file__, "take_whole_steps").finish(timeout=600)
    assert isinstance(seen, dict), seen
    return seen


def take_whole_steps(connection: Connection) -> None:
    warnings.simplefilter("default")
    registration = torch.utils.backend_registration
    registration._DummyBackendModule.get_amp_supported_dtype = lambda self: [torch.bfloat16]
    registration._setup_privateuseone_for_python_backend("madeup")
    bins_module.keepable = lambda tensor: True
    connection.send({name: watched(job, "madeup", backward=True) for name, job in JOBS.items()})


@pytest.mark.parametrize("name", JOBS)
def test_a_step_makes_nothing_wait(name: str, whole_steps: dict[str, list[str]] | None) -> None:
    outcome = watched(JOBS[name], "cuda", backward=False) if whole_steps is None else whole_steps[name]
    assert outcome == []


def offered(package: Any) -> set[str]:
    """What the modules of a package offer."""
    files = [outcome.name for outcome in pkgutil.iter_modules(package.__path__) if not outcome.name.startswith("_")]
    return {name for file in files for name in import_module(f"{package.__name__}.{file}").__all__}


def test_every_loss_head_and_metric_is_watched() -> None:
    def watched_names(jobs: dict[str, Any]) -> set[str]:
        return {name.split()[0] for name in jobs}

    assert offered(dt.losses) - NO_LOSSES == watched_names(LOSSES) == set(dt.losses.__all__) - NO_LOSSES
    assert {name for name in offered(dt.heads) if name.endswith("Head")} == watched_names(HEADS)
    assert {name for name in offered(dt.metrics) if name.endswith("Metrics")} <= watched_names(METRICS)
    for head in get_args(HeadName):
        assert head == "linear" or any(f"'head': '{head}'" in name for name in MODELS), head


class Asked(TorchFunctionMode):
    """Counts what is asked of tensors' values, on whatever device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "numpy", "bincount", "nonzero"):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def test_full_covariance_waits_once_a_step_to_sort_samples_by_bin(monkeypatch: pytest.MonkeyPatch) -> None:
    """As documented; fake tensors cannot go that way, so it is counted on the CPU, as if nothing were to be read."""
    _, step = fds_job("full", "features", "y", outside="drop")()
    d = Data(**batch())
    for name, module in list(sys.modules.items()):
        if name.startswith("dir_toolkit") and hasattr(module, "readable"):
            monkeypatch.setattr(module, "readable", lambda tensor: False)
    step(d)
    with Asked() as asked:
        step(d)
    assert asked.counts == {"bincount": 1, "tolist": 1}


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch knows no CUDA, not even of fake tensors")
@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (lambda d: d.y.sum().item(), "_local_scalar_dense"),
        (lambda d: d.y.tolist(), "_local_scalar_dense"),
        (lambda d: bool((d.y > 0).any()), "DataDependent"),
        (lambda d: d.y[d.y > 3], "nonzero"),
        (lambda d: d.y.clone().index_put_((d.y > 3,), torch.ones((), device=d.y.device)), "indexing by a mask"),
        (lambda d: d.y.repeat_interleave(d.c), "repeat_interleave"),
        (lambda d: d.y.unique(), "unique"),
        (lambda d: d.y.nonzero(), "nonzero"),
        (lambda d: torch.bincount(d.c, minlength=C), "bincount"),
        (lambda d: d.y.cpu(), "a copy from cuda to cpu"),
        (lambda d: torch.ones(3).to(d.y.device), "a copy from cpu to cuda"),
        (lambda d: torch.tensor([1.0, 2.0], device=d.y.device), "a tensor of Python's numbers"),
        (lambda d: d.y + torch.ones(N), "two devices in one operation"),
        (lambda d: d.y + torch.ones(()), "two devices in one operation"),
    ],
)
def test_the_watch_sees_what_waits(step: Callable[[Data], Any], expected: str) -> None:
    def job(d: Data) -> None:
        if d.x.device.type == "cuda":
            step(d)

    assert expected in " ".join(watched(alone(job), "cuda", backward=False))
