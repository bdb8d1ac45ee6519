from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dir_toolkit.errors import SettingsError
from dir_toolkit.experiment.training.runtime import Runtime, start_runtime

TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)


def test_one_process_needs_no_group() -> None:
    with start_runtime("cpu", seed=4) as runtime:
        assert runtime == Runtime(torch.device("cpu"), rank=0, world=1, precision="float32", seed=4)
        assert runtime.is_main
        model = nn.Linear(1, 1)
        assert runtime.parallel(model) is model
        runtime.barrier()
        runtime.share_buffers(model)
        assert runtime.any([True, False]) == [True, False]
        assert runtime.sum(torch.tensor(2.0)) == 2
        assert runtime.gather("mine") == ["mine"]


def test_bf16_lowers_the_forward_pass_only() -> None:
    with start_runtime("cpu", precision="bf16") as runtime:
        layer = nn.Linear(2, 2)
        with runtime.autocast():
            assert layer(torch.ones(1, 2)).dtype == torch.bfloat16
        assert layer.weight.dtype == torch.float32
    with start_runtime("cpu") as runtime, runtime.autocast():
        assert layer(torch.ones(1, 2)).dtype == torch.float32


def test_derived_seeds_depend_on_seed_and_key_alone() -> None:
    one, two = (Runtime(torch.device("cpu"), seed=seed) for seed in (1, 2))
    assert one.derive("order", 3) == one.derive("order", 3)
    assert len({one.derive("order", 3), one.derive("order", 4), one.derive("model", 3), two.derive("order", 3)}) == 4
    assert torch.equal(
        torch.rand(3, generator=one.generator("x")), torch.rand(3, generator=Runtime(one.device, seed=1).generator("x"))
    )


def test_seeded_on_the_cpu_leaves_accelerators_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    torch.manual_seed(1)
    assert seeded == [1]  # what a global seed does
    runtime = Runtime(torch.device("cpu"), seed=1)
    with runtime.seeded("init"):
        pass
    before = torch.get_rng_state()
    runtime.set_seed("init")
    assert torch.initial_seed() == runtime.derive("init")
    torch.set_rng_state(before)
    assert seeded == [1]


def test_seeded_gives_global_numbers_back() -> None:
    runtime = Runtime(torch.device("cpu"))
    before = torch.get_rng_state()
    with runtime.seeded("init"):
        one = torch.rand(2)
    with runtime.seeded("init"):
        assert torch.equal(torch.rand(2), one)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "mps", "meta"])
def test_unknown_devices_are_refused(device: str) -> None:
    with pytest.raises(ValueError, match=r'device must be "auto", "cpu", "cuda".*got'), start_runtime(device):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without CUDA")
def test_cuda_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r'cuda:0 must exist .* got 0 CUDA devices\. Use device="cpu"'):
        start_runtime("cuda").__enter__()
    with start_runtime("auto") as runtime:
        assert runtime.device == torch.device("cpu")


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="precision must be one of 'float32', 'bf16', got 'fp8'"):
        start_runtime("cpu", precision="fp8").__enter__()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed must be at least 0"):
        start_runtime("cpu", seed=-1).__enter__()


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"got no RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT\. Start with torchrun"):
        start_runtime("cpu").__enter__()
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ValueError, match="WORLD_SIZE must be a whole number, got 'two'"):
        start_runtime("cpu").__enter__()


def test_a_rank_that_would_write_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SettingsError, match=r"RANK must be below WORLD_SIZE, got RANK=1 and WORLD_SIZE=1\."):
        start_runtime("cpu").__enter__()


def test_torchruns_environment_starts_a_group_and_ends_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    begun = []

    def init(backend: str, device_id: torch.device | None) -> None:
        begun.append((backend, device_id))

    monkeypatch.setattr(dist, "init_process_group", init)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: begun.append("ended"))
    context = start_runtime("cpu")
    runtime = context.__enter__()
    assert (runtime.rank, runtime.world) == (0, 2)
    assert begun == [("gloo", None)]
    context.__exit__(KeyError, KeyError(), None)
    assert begun == [("gloo", None), "ended"]


def test_two_ranks_share_sums_and_buffers(two_ranks: Callable[..., list[Any]]) -> None:
    two_ranks(check_rank)


def check_rank(rank: int) -> None:
    with start_runtime("cpu") as runtime:
        assert (runtime.rank, runtime.world, runtime.is_main) == (rank, 2, rank == 0)
        runtime.barrier()
        mine = torch.tensor(float(rank + 1))
        assert runtime.sum(mine) == 3
        assert mine == rank + 1
        assert runtime.any([rank == 1, False]) == [True, False]
        assert runtime.gather({"rank": rank}) == ([{"rank": 0}, {"rank": 1}] if rank == 0 else [])
        norm = nn.BatchNorm1d(2)
        norm.running_mean = torch.full((2,), float(rank))
        runtime.share_buffers(norm)
        assert norm.running_mean.tolist() == [0, 0]
        assert isinstance(runtime.parallel(nn.Linear(1, 1)), nn.parallel.DistributedDataParallel)
    assert dist.is_initialized(), "a group that it did not start is left alone"
