from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dir_toolkit import _ranks


@pytest.mark.parametrize(
    ("backends", "accelerator", "device"),
    [
        ("cuda:nccl", "cuda", "cuda:3"),
        ("cuda:nccl2", "cuda", "cuda:3"),
        ("cuda:nccl-lazy,cpu:gloo", "cuda", "cuda:3"),
        ("cpu:gloo,cuda:nccl", "cuda", "cuda:3"),
        ("CPU:gloo,CUDA:NCCL", "cuda", "cuda:3"),
        ("cpu:nccl2,cuda:nccl2", "cuda", "cuda:3"),  # what torch takes a backend for that it does not know
        ("xpu:xccl", "xpu", "xpu:3"),
        ("cpu:gloo,cuda:gloo", "cuda", "cpu"),
        ("cpu:mpi,cuda:mpi", "cuda", "cpu"),
        ("cpu:gloo", "cuda", "cpu"),
        ("cpu:gloo", "mps", "cpu"),
        ("cpu:gloo,cuda:nccl", None, "cpu"),
    ],
)
def test_sums_lie_on_a_device_of_the_backend(
    backends: str, accelerator: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_ranks, "_accelerator", lambda: accelerator)
    monkeypatch.setattr(dist, "get_backend_config", lambda group: backends)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.xpu, "current_device", lambda: 3)
    free, bound = SimpleNamespace(bound_device_id=None), SimpleNamespace(bound_device_id=torch.device("cuda", 5))
    sums = torch.zeros(2)
    assert _ranks.reduce_device(sums, free) == torch.device(device)  # type: ignore[arg-type]
    if device == "cuda:3":
        assert _ranks.reduce_device(sums, bound) == torch.device("cuda", 5)  # type: ignore[arg-type]
        there = SimpleNamespace(device=torch.device("cuda", 1))
        assert _ranks.reduce_device(there, bound) == torch.device("cuda", 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", [None, "gloo", "cpu:gloo"])
def test_sums_of_one_rank_are_copies_fit_for_training(backend: Any, tmp_path: Any) -> None:
    """Under whatever name torch knows the backend by."""
    own = torch.arange(3)
    assert _ranks.summed(own)[0] is own
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        with torch.inference_mode():
            (total,) = _ranks.summed(torch.arange(3))
            (in_group,) = _ranks.summed(own, group=dist.new_group([0]))
        assert total.tolist() == in_group.tolist() == [0, 1, 2]
        assert not total.is_inference()
        assert in_group.data_ptr() != own.data_ptr()
    finally:
        dist.destroy_process_group()
