"""A small transformer learns a text letter by letter, and is told where its work went.

    pip install -e ".[test]"
    python examples/char_transformer.py                                    # 15 seconds on one core
    python examples/char_transformer.py --optimizer sgd --lr 0.3 --batch-size 4

The text is most of the Declaration of Independence of the United States (1776), `declaration.txt` beside
this file, cut into windows of 32 letters; the model has two layers of width 64. The measurement is one line in
`main`. At the end come the losses, a line that the model continues, the table of the run, and its diagnosis.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.data import DataLoader, TensorDataset

from lightning_speedlimit import SpeedLimit
from lightning_speedlimit.report.diagnosis import diagnose

TEXT = Path(__file__).with_name("declaration.txt")
CONTEXT = 32  # letters
WIDTH = 64
HEADS = 4
LAYERS = 2
LEARNING_RATES = {"adam": 3e-3, "adamw": 3e-3, "momentum": 0.03, "sgd": 0.3}
LOG_EVERY = 10  # steps


# --- text and model


def read_text() -> tuple[str, Tensor]:
    """The alphabet, and the text as windows (windows, CONTEXT + 1) int64 that meet but for one letter."""
    text = TEXT.read_text(encoding="utf-8")
    alphabet = "".join(sorted(set(text)))
    places = torch.tensor([alphabet.index(letter) for letter in text])
    return alphabet, places.unfold(0, CONTEXT + 1, CONTEXT).clone()


class Block(nn.Module):
    """x + attention(x), then x + mlp(x), each after a layer norm; a letter sees only those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.in_projection, self.out_projection = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, letters, WIDTH) → the same."""
        parts = self.in_projection(self.norm_1(x)).unflatten(-1, (3, HEADS, -1)).transpose(1, 3)
        query, key, value = parts.unbind(2)  # (batch, HEADS, letters, WIDTH / HEADS) each
        seen = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out_projection(seen.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_2(x))


class CharTransformer(nn.Module):
    """Letters (batch, letters) int64 → scores of the next letter (batch, letters, alphabet)."""

    def __init__(self, alphabet: int) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(alphabet, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, alphabet)

    def forward(self, text: Tensor) -> Tensor:
        x = self.letters(text) + self.places.weight[: text.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross entropy of the next letter, nats."""
    return cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


# --- training


def make_optimizer(name: str, parameters: Any, lr: float) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr)
    if name == "momentum":
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name](parameters, lr=lr)


class LanguageModel(pl.LightningModule):
    """A LightningModule like any other."""

    def __init__(self, alphabet: int, optimizer: str, lr: float) -> None:
        super().__init__()
        self.network, self.optimizer_name, self.lr = CharTransformer(alphabet), optimizer, lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = loss_of(self.network, batch[0])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.optimizer_name, self.parameters(), self.lr)


@torch.no_grad()
def complete(network: nn.Module, start: Tensor, length: int) -> Tensor:
    """The likeliest letters after those of `start` (letters,), one after the other: (length,) int64."""
    places = start
    for _ in range(length):
        places = torch.cat([places, network(places[None, -CONTEXT:])[0, -1].argmax().reshape(1)])
    return places[len(start) :]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains a small transformer on letters and tells where its work went.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--optimizer", choices=LEARNING_RATES, default="adam")
    parser.add_argument("--lr", type=float, help=f"default: {LEARNING_RATES}")
    parser.add_argument("--batch-size", type=int, default=16, metavar="WINDOWS", help="of the 243 in the text")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the windows")
    parser.add_argument("--output", type=Path, default=Path("demo_runs/transformer"), metavar="DIR")
    parser.add_argument("--quick", action="store_true", help="at most 20 steps, to see that everything works")
    options = parser.parse_args()
    if options.lr is None:
        options.lr = LEARNING_RATES[options.optimizer]
    if options.quick:
        options.steps = min(options.steps, 20)
    return options


def quieten_lightning() -> None:
    """No tips, no devices that were not found, no advice for larger data sets."""
    for name in ("pytorch_lightning", "lightning.pytorch"):  # the package under its two names
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*exists and is not empty.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")


def main() -> None:
    started = time.monotonic()
    options = parse_arguments()
    quieten_lightning()
    torch.set_num_threads(1)  # the same sums on every machine
    alphabet, windows = read_text()
    pl.seed_everything(options.seed, verbose=False)
    module = LanguageModel(len(alphabet), options.optimizer, options.lr)
    order = torch.Generator().manual_seed(options.seed)
    batches = DataLoader(TensorDataset(windows), options.batch_size, shuffle=True, drop_last=True, generator=order)
    with torch.no_grad():
        first = loss_of(module.network, windows).item()
    measurement = SpeedLimit(print_summary=False)  # the one line: all else is training as ever
    name = f"{options.optimizer}-lr{options.lr:g}-batch{options.batch_size}-seed{options.seed}"
    trainer = pl.Trainer(
        callbacks=[measurement],
        logger=CSVLogger(options.output, name, version=""),
        log_every_n_steps=LOG_EVERY,
        max_steps=options.steps,
        max_epochs=-1,
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, batches)
    with torch.no_grad():
        last = loss_of(module.network, windows).item()
    record = measurement.record
    assert record is not None  # there is one after every fit
    print(f"{options.steps} steps of {options.optimizer}, lr {options.lr:g}, {options.batch_size} windows a batch:")
    print(f"loss on all windows {first:.3f} -> {last:.3f}, after {time.monotonic() - started:.0f} s\n")
    start, rest = windows[1].split((CONTEXT // 2, CONTEXT // 2 + 1))
    made = complete(module.network, start, len(rest))
    said, wanted, continued = ("".join(alphabet[i] for i in places) for places in (start, rest, made))
    print(f"It read {said!r} … and goes on {continued!r}, where the text has {wanted!r}\n")
    print(record.summary())
    print("\nDiagnosis\n")
    for finding in diagnose(record):
        print(f"- {finding.cause}: {finding.sentence} {finding.advice}".rstrip())
    print(f'\nAgain      RunRecord.load("{options.output / name / "speed_limit"}").summary()')


if __name__ == "__main__":
    main()
