"""The memory that is free."""

from pathlib import Path

import pytest

from dir_toolkit import _memory


def test_free_memory_is_the_least_that_machine_and_container_tell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    free = _memory.free_memory()
    assert free is not None
    assert 2**20 < free < 2**50
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 5 kB\n")
    monkeypatch.setattr(_memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(_memory, "_CGROUP", tmp_path)
    assert _memory.free_memory() == 5 * 1024
    (tmp_path / "memory").mkdir()
    for folder, limit, usage in (
        (tmp_path, "memory.max", "memory.current"),
        (tmp_path / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        (folder / "memory.stat").write_text("anon 600\ninactive_file 30\nactive_file 7\n")
        (folder / usage).write_text("700\n")
        (folder / limit).write_text("1000\n")
        assert _memory.free_memory() == 1000 - 700 + 37
        (folder / limit).write_text("max\n")
        assert _memory.free_memory() == 5 * 1024
