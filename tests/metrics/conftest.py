import sys

import pytest


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is looked at, as on an accelerator."""
    for name, module in list(sys.modules.items()):
        if name.startswith("dir_toolkit") and hasattr(module, "readable"):
            monkeypatch.setattr(module, "readable", lambda tensor: False)
