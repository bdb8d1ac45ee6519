"""Sentences with a continuous label: what LDS and FDS do to the errors of rare labels, on frozen word vectors.

    python recipes/text.py --root DIR                      # pairs of sentences and their similarity (STS-B-DIR)
    python recipes/text.py --root DIR --data emobank       # sentences and how pleasant they are

DIR holds the texts and the vectors: the data cards ``sts_b_dir`` and ``emobank`` say where to get them. A small
recurrent network reads the words. It is trained with squared errors and a constant learning rate. The epoch with the
smallest MAE over all validation labels is used. At the end the recipe prints the paired differences in test MSE over
seeds. ``--resume`` continues a run that was stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from command_line import parse, refuse, run, unfit_folder


@dataclass(frozen=True)
class Settings:
    root: Path
    """Folder of the texts and of the vectors."""
    data: Literal["sts_b_dir", "emobank"] = "sts_b_dir"
    """The label: similarity of two sentences, or valence of one."""
    vectors: str | None = None
    """Name of the file of word vectors; by default glove.6B.100d.txt or glove_100d.txt."""
    methods: tuple[str, ...] = ("vanilla", "lds", "fds", "lds+fds")
    """The methods to train: vanilla, lds, fds, lds+fds, permuted or noise (controls: FDS with the labels permuted
    within each batch, or noise as large as its changes) or soft+tau (soft bins, adjusted by the prior)."""
    seeds: int = 3
    """The number of seeds per method: 0, 1, ..."""
    epochs: int = 12
    """Passes over the training sentences."""
    resume: bool = False
    """Continue an earlier run in --out that was stopped."""
    out: Path | None = None
    """Folder of all results; by default runs/text/<data>."""


if __name__ == "__main__":
    SETTINGS = parse(Settings)  # --help is answered here, before torch is loaded

import numpy as np
import torch
from comparing import compare, paired_differences
from torch import Tensor, nn

import dir_toolkit as dt
from dir_toolkit.experiment.data.text import emobank, sts_b_dir, word_vectors
from dir_toolkit.experiment.study import Task
from dir_toolkit.experiment.training.loop import Optimization


class Reader(nn.Module):
    """Features (N, 128) of a sentence (N, L), or of a pair (N, 2, L) from their differences and products."""

    def __init__(self, vectors: np.ndarray, *, pairs: bool, width: int = 64) -> None:
        super().__init__()
        self.words = nn.Embedding.from_pretrained(torch.from_numpy(vectors), padding_idx=0)
        self.recurrent = nn.GRU(vectors.shape[1], width, batch_first=True, bidirectional=True)
        size = 2 * width
        self.mix = nn.Sequential(nn.Dropout(0.2), nn.Linear(2 * size if pairs else size, 128), nn.ReLU())
        self.num_features = 128

    def forward(self, words: Tensor) -> Tensor:
        sentences = words.flatten(0, -2)
        states, _ = self.recurrent(self.words(sentences))
        states = states.masked_fill((sentences == 0).unsqueeze(-1), -10)  # so that padding is never the maximum
        read = states.amax(1).unflatten(0, words.shape[:-1])
        if words.ndim == 3:
            read = torch.cat([(read[:, 0] - read[:, 1]).abs(), read[:, 0] * read[:, 1]], 1)
        return self.mix(read)


def main(settings: Settings) -> None:
    out = settings.out or Path("runs/text") / settings.data
    refuse("recipes/text.py", unfit_folder("--out", out))
    number, vectors = word_vectors(settings.root, settings.vectors)
    pairs = settings.data == "sts_b_dir"
    splits = (sts_b_dir if pairs else emobank)(settings.root, number)
    bins = dt.Bins.uniform(0, 5, width=0.1) if pairs else dt.Bins.uniform(1, 5, width=0.1)
    title, label = ("STS-B-DIR", "similarity") if pairs else ("EmoBank", "valence")
    task = Task(lambda _: splits, bins, lambda _: Reader(vectors, pairs=pairs), title, label)
    optimization = Optimization(epochs=settings.epochs, lr=1e-3, schedule="constant", warmup=0.0, weight_decay=0.0)
    study = compare(
        "recipes/text.py", task, settings, out, loss="weighted_mse", optimization=optimization, selects="mae/all"
    )
    print(
        paired_differences(
            study,
            (("lds", "vanilla"), ("fds", "vanilla"), ("permuted", "vanilla"), ("noise", "vanilla"), ("lds+fds", "lds")),
        )
    )


if __name__ == "__main__":
    run(main, SETTINGS)
