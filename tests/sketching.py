"""Reports without the time that drawing takes, in the processes that tests start, too."""

from __future__ import annotations

import pytest


def sketch(patch: pytest.MonkeyPatch) -> None:
    """Figures of reports are made, and their files are empty."""
    results = "dir_toolkit.experiment.results"
    patch.setattr(f"{results}.summary.save_figure", lambda figure, path: path.write_bytes(b""))
    patch.setattr(f"{results}.summary.figure_to_tensorboard", lambda *_: None)
    patch.setattr(f"{results}.report.figure_svg", lambda *_, **__: "<svg></svg>")
