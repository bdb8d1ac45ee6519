"""A training with the Hugging Face Trainer and FDS: it is added to an existing model.

    python recipes/with_transformers.py     # letters drawn by this recipe, no download; needs transformers[torch]

A small transformer predicts the age of a writer from the words of a letter, and few writers are old. A callback drives
FDS and would save its statistics beside the Trainer's checkpoints. LDS weights are one more column of the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from command_line import parse, run

METHODS = {"vanilla": (False, False), "lds": (True, False), "lds+fds": (True, True)}  # LDS weights, FDS
WORDS = 60


@dataclass(frozen=True)
class Settings:
    samples: int = 2000
    """Letters to train on."""
    epochs: int = 4
    """Passes over them."""


if __name__ == "__main__":
    SETTINGS = parse(Settings)  # --help is answered here, before torch is loaded

from tempfile import TemporaryDirectory

import torch
from torch import nn
from transformers import DistilBertConfig, DistilBertModel, PrinterCallback, Trainer, TrainingArguments, logging

import dir_toolkit as dt
from dir_toolkit.integrations.transformers import FDSCallback


def draw(n: int, seed: int, *, even: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Letters (n, 12) of word numbers from 0 to 59, and ages (n,) in [0, 100] years, few of them old unless ``even``.

    Each word is most frequent at some age, and the words of old writers vary more."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(n, 1, generator=generator)
    age = 100 * share if even else (-20 * (1 - share).log()).clamp(0, 100)
    used_at = age + torch.randn(n, 12, generator=generator) * (8 + 0.2 * age)
    order = torch.randperm(WORDS, generator=torch.Generator().manual_seed(0))  # a number carries no information
    return order[(used_at / 100 * WORDS).long().clamp(0, WORDS - 1)], age[:, 0]


def main(settings: Settings) -> None:
    class Writer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shape: dict[str, Any] = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "dropout": 0.0}
            self.body = DistilBertModel(DistilBertConfig(vocab_size=WORDS, max_position_embeddings=12, **shape))
            self.head = nn.Linear(32, 1)

        def forward(self, words: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
            years = 20 + 20 * self.head(self.body(words).last_hidden_state.mean(1))[:, 0]
            return {"loss": dt.weighted_l1(years, labels, weight), "years": years}

    logging.set_verbosity_error()
    bins = dt.Bins.uniform(0, 100, width=2)
    (words, age), (test_words, test_age) = draw(settings.samples, seed=1), draw(4000, seed=2, even=True)
    density = dt.LabelDensity.count(age, bins)
    weights = dt.LDS(bins).fit(density)(age)
    print(f"MAE in years by the training samples of a bin of two; {settings.epochs} epochs")
    for name, (weighted, smoothed) in METHODS.items():
        torch.manual_seed(0)
        model = Writer()
        fds = dt.FDS(bins, 32, momentum=0.5)
        if smoothed:
            fds.attach(model.head, "input")
        columns = {"words": words, "labels": age, "weight": weights if weighted else torch.ones_like(weights)}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        with TemporaryDirectory() as folder:
            steps: dict[str, Any] = {"per_device_train_batch_size": 32, "learning_rate": 3e-3}
            quiet: dict[str, Any] = {"disable_tqdm": True, "logging_strategy": "no", "report_to": "none"}
            machine: dict[str, Any] = {"use_cpu": True, "dataloader_pin_memory": False, "save_strategy": "no"}
            arguments = TrainingArguments(folder, num_train_epochs=settings.epochs, **steps, **quiet, **machine, seed=0)
            callbacks = [FDSCallback(fds)] if smoothed else []
            trainer = Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        with torch.no_grad():
            years = model.eval()(test_words, test_age, torch.ones_like(test_age))["years"]
        errors = dt.regression_metrics(years, test_age, density)
        if name == "vanilla":
            print(" " * 8 + "".join(f"{region:>9}" for region in (*errors.region.values, "bMAE")))
        print(f"{name:8}" + "".join(f"{mae:9.2f}" for mae in [*errors.mae.values, errors.bmae.sel(region="all")]))


if __name__ == "__main__":
    run(main, SETTINGS)
