"""Runs the code of the gallery's pages, and writes what it printed into them, their pictures, and thumbnails.

    OMP_NUM_THREADS=1 python docs/tutorials.py            # all pages, or name some: table classes
    python docs/tutorials.py digits portraits             # the samples in these data cards

It prints the seconds of CPU time of each page, which ``gallery.md`` states. A page's notebook holds the same cells.
"""

from __future__ import annotations

import io
import os
import re
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

DOCS = Path(__file__).parent
# A cell of code, and what the page shows of what it prints.
CELL = re.compile(r"^```python\n(.*?)^```\n(?:\n```\n(.*?)^```\n)?", re.M | re.S)
PICTURE = re.compile(r"^!\[[^]]*\]\(([^)]+)\)", re.M)


def gallery() -> list[str]:
    """The pages of the gallery in its order, as paths below ``docs``."""
    return re.findall(r"^- \[.*?\]\(([\w/.-]+\.md)\)", (DOCS / "gallery.md").read_text("utf-8"), re.M)


def thumbnail(page: str) -> str:
    """The small picture of a page, as a path below ``docs``."""
    return f"gallery/{Path(page).stem}.png"


def run(text: str, adapted: Callable[[str], str] = str) -> Iterator[tuple[str, str]]:
    """What each cell of a page shows and what it prints, where cells run in order and share their names."""
    names: dict[str, Any] = {"__name__": "page"}
    for code, shown in CELL.findall(text):
        with redirect_stdout(io.StringIO()) as printed, warnings.catch_warnings():
            exec(compile(adapted(code), "page", "exec"), names)
        yield shown, printed.getvalue()


def small(picture: Path) -> Image.Image:
    """A picture as the gallery shows it."""
    from PIL import Image

    image = Image.open(picture).convert("RGB")
    image.thumbnail((400, 225))
    return image


def samples(card: str) -> Image.Image:
    """The row of images in a data card, in the order of their labels."""
    import numpy as np
    from PIL import Image

    from dir_toolkit.experiment.data.digits import digits
    from dir_toolkit.experiment.data.portraits import draw_portraits

    if card == "portraits":
        images = draw_portraits(range(5, 100, 10), size=48, split="test")
    else:
        test = digits().test
        images = np.stack([test.images[list(test.labels).index(digit)] for digit in range(10)])
    row = np.concatenate([*images.transpose(0, 2, 3, 1)], 1)  # (size, 10 size, 1 or 3)
    return Image.fromarray(row.squeeze()).convert("RGB").resize((480, 48), Image.Resampling.NEAREST)


def wrapped(printed: str) -> str:
    """What was printed in lines that fit on a page."""
    lines = printed.split("\n")
    return "\n".join(textwrap.fill(line, 120, subsequent_indent="  ") if len(line) > 120 else line for line in lines)


def refresh(page: Path) -> float:
    """Run a page in the working folder, and write what it shows. Returns the seconds of CPU time."""
    from PIL import Image

    text, begun = page.read_text("utf-8"), time.process_time()
    results = iter(list(run(text)))
    seconds = time.process_time() - begun

    def cell(match: re.Match[str]) -> str:
        _, printed = next(results)
        return f"```python\n{match[1]}```\n" + (f"\n```\n{wrapped(printed)}```\n" if printed else "")

    page.write_text(CELL.sub(cell, text), "utf-8")
    pictures = [page.parent / link for link in PICTURE.findall(text) if Path(Path(link).name).exists()]
    for picture in pictures:
        write(Image.open(picture.name).convert("RGB"), picture)
    write(small(pictures[0]), DOCS / thumbnail(page.name))
    return seconds


def write(image: Image.Image, path: Path) -> None:
    """Write a picture in 96 colours, which takes a third of the bytes."""
    image.quantize(96).save(path, optimize=True)


def main(names: list[str]) -> None:
    """Refresh the named pages and samples, or all."""
    for page in gallery():
        if not names or Path(page).stem in names:
            with TemporaryDirectory() as folder:
                os.chdir(folder)
                print(f"{refresh(DOCS / page):5.1f} s  {page}")
                os.chdir(DOCS)
    for card in ("digits", "portraits"):
        if not names or card in names:
            write(samples(card), DOCS.parent / "data_cards" / f"{card}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
