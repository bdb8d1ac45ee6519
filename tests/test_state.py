import json
import tracemalloc

import numpy as np
import pytest
import torch
from torch import nn

import dir_toolkit as dt
from dir_toolkit import Bins
from dir_toolkit._state import pack, unpack
from dir_toolkit.errors import CheckpointError


def example():
    return {
        "epoch": torch.tensor(7),
        "mean": torch.tensor([[1.5, float("nan")], [-0.0, float("inf")]], dtype=torch.float64),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "none": torch.zeros(0, 4),
        "bins": Bins.uniform(0, 3, width=1).settings,
        "words": ["a", None, True, 1.25, {"deep": ("x", 2)}],
    }


def test_a_state_comes_back_as_it_was():
    state = unpack(pack(example()))
    for name, tensor in example().items():
        if isinstance(tensor, torch.Tensor):
            assert state[name].dtype == tensor.dtype
            assert torch.equal(state[name].nan_to_num(99), tensor.nan_to_num(99))
    assert Bins.from_dict(state["bins"]) == Bins.uniform(0, 3, width=1)
    assert state["words"] == example()["words"]


def test_the_length_does_not_depend_on_the_numbers_in_tensors():
    assert pack({"epoch": torch.tensor(1)}).shape == pack({"epoch": torch.tensor(10**12)}).shape


@pytest.mark.parametrize("seed", range(200))
def test_changed_bytes_end_in_our_own_error_or_in_a_dict(seed):
    random = np.random.default_rng(seed)
    packed = pack(example()).clone()
    match seed % 3:
        case 0:
            packed = packed[: random.integers(len(packed))]
        case 1:
            for _ in range(random.integers(1, 5)):
                packed[random.integers(len(packed) // 2)] = int(random.integers(256))
        case 2:
            packed = torch.cat([packed[: random.integers(len(packed))], packed])
    try:
        state = unpack(packed)
    except CheckpointError:
        return
    assert isinstance(state, dict)


def test_another_format_is_named():
    text = json.dumps({"format": 99, "state": {}}).encode()
    blob = len(text).to_bytes(8, "little") + text
    with pytest.raises(CheckpointError, match=r"of format 1, got format 99. Load it with the release"):
        unpack(torch.frombuffer(bytearray(blob), dtype=torch.uint8))


def test_bytes_that_are_named_again_and_again_are_refused():
    """Else a small file could ask for a thousand times its size."""
    once = {"tensor": ["uint8", [100_000], 0]}
    text = json.dumps({"format": 1, "state": {"many": [once] * 1000}}).encode()
    blob = len(text).to_bytes(8, "little") + text + bytes(100_000)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="tensors that overlap"):
        unpack(torch.frombuffer(bytearray(blob), dtype=torch.uint8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * len(blob)


@pytest.mark.parametrize("packed", [None, {}, torch.zeros(4), torch.zeros(2, 2, dtype=torch.uint8)])
def test_what_is_no_packed_state_is_refused(packed):
    with pytest.raises(CheckpointError, match="the bytes from state_dict"):
        unpack(packed)


MADE = [
    lambda: dt.heads.LinearHead(4, 3),
    lambda: dt.heads.CosineHead(4, 3, learn_scale=True),
    lambda: dt.AffinityHead(4, 3),
    lambda: dt.heads.NearestMeanHead(4, 3),
    lambda: dt.heads.ScaledHead(nn.Linear(4, 3)),
    lambda: dt.losses.BatchMCLoss(),
    lambda: dt.losses.GaussianMixtureLoss([0.5, 0.5], [1.0, 2.0], [1.0, 1.0]),
    lambda: dt.losses.BinnedIntegrationLoss(Bins.uniform(0, 3, width=1), [0.2, 0.3, 0.5]),
    lambda: dt.losses.ConRLoss(weights=dt.LDS(Bins.uniform(0, 3, width=1)).fit([0.5, 0.5, 2.5])),
    lambda: dt.losses.CenterLoss(4, 3),
    lambda: dt.LogitAdjuster([0.2, 0.8]),
]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("fault", ["missing", "of another shape", "unknown besides"])
@pytest.mark.parametrize("make", MADE, ids=lambda make: type(make()).__name__)
def test_a_refused_load_changes_nothing(make, fault, assign):
    module = make()
    good = {name: value + 1 if value.is_floating_point() else value for name, value in module.state_dict().items()}
    for name in good:
        state = dict(good)
        if fault == "missing":
            del state[name]
        elif fault == "of another shape":
            state[name] = torch.ones(7, 7)
        else:
            state["other"] = torch.ones(1)
        before = {key: value.clone() for key, value in module.state_dict().items()}
        parameters = list(module.parameters())
        with pytest.raises((RuntimeError, ValueError)):
            module.load_state_dict(state, assign=assign)
        assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))
        for key, value in module.state_dict().items():
            assert torch.equal(value.nan_to_num(-1), before[key].nan_to_num(-1))


@pytest.mark.parametrize("make", MADE, ids=lambda make: type(make()).__name__)
def test_what_is_made_and_moved_in_inference_mode_can_be_trained(make):
    with torch.inference_mode():
        module = make().double()
    assert not any(tensor.is_inference() for tensor in (*module.parameters(), *module.buffers()))
