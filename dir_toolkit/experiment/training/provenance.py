"""The provenance of a result, beside its settings: versions, code, machine and data."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ..._files import write_atomically
from ..data.images import Splits
from .runtime import Runtime

__all__ = ["environment", "write_json"]


def environment(runtime: Runtime, splits: Splits) -> dict[str, Any]:
    """Versions, the commit of a checkout, the device, and digests of the data, as plain values."""
    device, threads = runtime.device, torch.get_num_threads()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "versions": {
            "python": platform.python_version(),
            "dir_toolkit": __version__,
            "torch": str(torch.__version__),  # with the build, unlike the version of the package
            **{package: _version(package) for package in ("numpy", "scipy", "xarray")},
        },
        "commit": _commit(),
        "device": f"{device.type} ({name}), {runtime.world} process{'es' * (runtime.world > 1)}, "
        f"{threads} thread{'s' * (threads > 1)}, {runtime.precision}",
        "data": {
            "source": splits.source,
            "sizes": {part: len(getattr(splits, part)) for part in ("train", "val", "test")},
            "digests": {part: getattr(splits, part).digest for part in ("train", "val", "test")},
            "skipped": splits.skipped,
        },
    }


_version = cache(version)  # which reads files, and a study asks for each of its runs


@cache  # the code that runs was read once, and asking git takes longer than the rest of a small run's provenance
def _commit() -> str:
    """The commit of the checkout that this package lies in, or ``unknown``."""
    checkout = Path(__file__).parents[3]
    # Git would find the project around a site-packages folder.
    if not (checkout / ".git").exists():
        return "unknown"
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=checkout,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return described.stdout.strip() or "unknown"


def write_json(path: str | os.PathLike[str], values: Mapping[str, Any]) -> None:
    """Write plain values as JSON, atomically. Paths become str."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(values, indent=2, default=str) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))
