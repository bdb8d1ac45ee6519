"""Common parts of the recipes: the command line, the command as it was typed, and a clean exit in every case."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, fields, make_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import tyro

_Settings = TypeVar("_Settings")

PLACES = ("root", "listing", "out")
"""Settings that name places on this machine. No result shows them."""


def worded(text: str) -> str:
    """The text with each recipe named as its reader can call it: ``python recipes/age.py`` in a checkout, and
    ``dir-toolkit age`` where a wheel brought the recipes."""
    if not Path(__file__).parents[1].joinpath("__main__.py").exists():
        return text
    text = re.sub(r"(torchrun .*)\brecipes/([\w/]+)\.py", r"\1-m dir_toolkit \2", text)
    return re.sub(r"(?:python )?\brecipes/([\w/]+)\.py", r"dir-toolkit \1", text)


def _called() -> str:
    """What was started, as ``--help`` names it."""
    folder, script = Path(__file__).resolve().parent, Path(sys.argv[0]).resolve()
    return worded(f"recipes/{script.relative_to(folder).as_posix()}") if folder in script.parents else sys.argv[0]


def typed_command(script: str, places: Collection[str] = PLACES) -> str:
    """The command as it was typed, with DIR in place of each path on this machine."""
    options = [f"--{name}" for name in places]
    words = [worded(f"python {script}")]
    for before, word in pairwise(["", *sys.argv[1:]]):
        name, equals, _ = word.partition("=")
        if before in options:
            word = "DIR"
        elif equals and name in options:
            word = f"{name}=DIR"
        words.append(word)
    return " ".join(words)


def shown(settings: Any) -> dict[str, Any]:
    """The settings that a report shows."""
    return {name: value for name, value in asdict(settings).items() if name not in (*PLACES, "resume")}


def unfit_folder(option: str, folder: Path) -> list[str]:
    """The faults of an output folder, which are collected before hours are spent on its contents."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        return [f"{option} must be a folder, got {folder}, where {there} is a file."]
    if not os.access(there, os.W_OK | os.X_OK):
        return [f"{option} must be a folder that can be written to, got {folder}, where {there} cannot."]
    return []


def unknown(option: str, names: Collection[str], known: Collection[str]) -> list[str]:
    """The faults of names, of which there must be one and each must be known."""
    got = [name for name in names if name not in known] or ([] if names else ["none"])
    return [f"{option} must name some of {', '.join(known)}, got {name}." for name in got]


def too_low(settings: Any, **lowest: int) -> list[str]:
    """The faults of settings that are below the least that they may be."""
    given = {name: getattr(settings, name) for name in lowest}
    return [
        f"--{name.replace('_', '-')} must be at least {lowest[name]}, got {value}."
        for name, value in given.items()
        if value is not None and value < lowest[name]
    ]


def write(path: Path, text: str) -> None:
    """Replace a file, never in part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".new")
    whole.write_text(text, encoding="utf-8")
    whole.replace(path)


def refuse(recipe: str, faults: Collection[str]) -> None:
    """Raise one error that names all faults of the settings, if there are any."""
    if faults:
        from dir_toolkit.errors import SettingsError

        listed = "\n".join(["these settings cannot run:", *faults]).replace("\n", "\n  ")
        raise SettingsError(f"{recipe}: {listed}")


def parse(settings: type[_Settings], *, parts: Sequence[type] = (), description: str | None = None) -> _Settings:
    """The settings from the command line. ``--help`` is answered here, so call it before anything slow is imported.

    Args:
        parts: the dataclasses that the settings consist of; ``--help`` shows the options of each in a box of its own.
        description: the text of ``--help``; by default the docstring of the recipe.
    """
    for stream in (sys.stdout, sys.stderr):  # a terminal without UTF-8 shows "?" for other characters
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        text = worded(description or sys.modules["__main__"].__doc__ or "")
        asked: Any = settings
        if parts:
            asked = make_dataclass("Parts", [(part.__name__.lower(), part) for part in parts])
            asked = tyro.conf.configure(tyro.conf.OmitArgPrefixes)(asked)
        given = tyro.cli(asked, prog=_called(), description=text)
    except BrokenPipeError:  # the reader has ended, as after `| head`, and the rest of the output is dropped
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    if not parts:
        return given
    return settings(
        **{field.name: getattr(part, field.name) for part in vars(given).values() for field in fields(part)}
    )


def run(main: Callable[[_Settings], None], settings: _Settings) -> None:
    """Run a recipe and exit. Bad input ends in a message without a traceback."""
    ending: int | str = 0
    try:
        main(settings)
    except KeyboardInterrupt:
        ending = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        ending = 141
    except Exception as error:
        from dir_toolkit.errors import DirToolkitError

        if isinstance(error, (DirToolkitError, ImportError)):
            ending = worded(str(error))
        elif isinstance(error, OSError):  # a full disk, a file where a folder should be
            ending = f"{type(error).__name__}: {error}. Files written before are intact: continue with --resume."
        else:
            raise
    # Not in the except clause, where the error would keep the network alive until Python ends, and ranks might hang.
    sys.exit(ending)
