"""One training with one of Lightning's two packages, told by its name; the other one need not be there.

As a script it hides the other one first and writes what it saw: `python namespace_cases.py PACKAGE FOLDER`. The oracle
is a loop of plain torch over the same batches.
"""

import contextlib
import importlib
import io
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

PACKAGES = ("pytorch_lightning", "lightning.pytorch")
STEPS, PER_EPOCH, RATE = 12, 4, 0.05

Batch = tuple[Tensor, Tensor]


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(PER_EPOCH):
        x = torch.randn(6, 4, generator=generator, dtype=torch.float64)
        found.append((x, x.sum(1, keepdim=True) + 0.3 * torch.randn(6, 1, generator=generator, dtype=torch.float64)))
    return found


class Again:
    """Batches in order; tells a checkpoint where it is."""

    def __init__(self) -> None:
        self.position = 0

    def __len__(self) -> int:
        return PER_EPOCH

    def __iter__(self) -> Iterator[Batch]:
        self.position %= PER_EPOCH
        while self.position < PER_EPOCH:
            self.position += 1
            yield batches()[self.position - 1]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def plain() -> dict[str, float]:
    """The same training without Lightning and the package, and its sums."""
    model = network()
    parameters = list(model.parameters())
    start = [p.detach().clone() for p in parameters]
    squares, works = [], []
    for step in range(STEPS):
        x, y = batches()[step % PER_EPOCH]
        gradients = torch.autograd.grad(nn.functional.mse_loss(model(x), y), parameters)
        squares.append(math.fsum(float((RATE * g).square().sum()) for g in gradients))
        works.append(math.fsum(RATE * float(g.square().sum()) for g in gradients))
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p -= RATE * g
    moved = math.fsum(float((p - p0).square().sum()) for p, p0 in zip(parameters, start, strict=True))
    path, action = math.fsum(map(math.sqrt, squares)), math.fsum(squares)
    return {
        "displacement": math.sqrt(moved),
        "path_length": path,
        "action": action,
        "work_ito": math.fsum(works),
        "kinematic_efficiency": moved / (STEPS * action),
    }


def module(package: str) -> Any:
    """A LightningModule of that package."""
    lightning = importlib.import_module(package)

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            loss = nn.functional.mse_loss(self.network(batch[0]), batch[1])
            self.log("loss", loss)  # a probe must find a logger of this package to mute
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=RATE)

    return Module()


def fit(package: str, folder: Path, callbacks: Any, *, ckpt_path: Path | None = None, **options: Any) -> Any:
    lightning = importlib.import_module(package)
    kind = options.pop("trainer", lightning.Trainer)
    settings: dict[str, Any] = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 3,
        "max_epochs": STEPS // PER_EPOCH,
    }
    trainer = kind(callbacks=callbacks, **(settings | options))
    trainer.fit(module(package), Again(), ckpt_path=ckpt_path)
    return trainer


def quiet(**options: Any) -> Any:
    from lightning_speedlimit import SpeedLimit

    return SpeedLimit(print_summary=False, log_figures=False, loss_window=2, **options)


def checkpoints(package: str, folder: Path) -> Any:
    """Leaves step=6.ckpt, in the middle of the second epoch."""
    kind = importlib.import_module(f"{package}.callbacks").ModelCheckpoint
    return kind(folder, filename="{step}", every_n_train_steps=6, save_top_k=-1)


def columns(callback: Any) -> dict[str, list[float]]:
    """All but the wall clock, which no two runs share."""
    found = callback.record.columns
    return {name: [float(v) for v in column] for name, column in found.items() if name != "seconds"}


YAML = """
trainer:
  accelerator: cpu
  max_steps: 2
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_speedlimit.SpeedLimit
      init_args:
        {name}: {value}
        per_layer: false
        dirpath: {folder}
        print_summary: false
"""


def command_line(package: str, folder: Path, name: str = "clock", value: object = "lr") -> Any:
    """LightningCLI with the callback in a file."""
    cli = importlib.import_module(f"{package}.cli")
    demos = importlib.import_module(f"{package}.demos.boring_classes")
    file = folder / "config.yaml"
    file.write_text(YAML.format(name=name, value=value, folder=folder / "record"), encoding="utf-8")
    arguments = ["fit", "--config", str(file)]
    with mock.patch.object(sys, "argv", ["train.py"]):  # else it warns that there are two kinds of arguments
        return cli.LightningCLI(demos.BoringModel, demos.BoringDataModule, args=arguments, save_config_callback=None)


def command_line_error(package: str, folder: Path, name: str, value: object) -> str:
    """What it prints before it gives up."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        command_line(package, folder, name, value)
    return said.getvalue()


def seen(package: str, folder: Path) -> dict[str, Any]:
    """Everything that a package is asked for, in plain types."""
    found: dict[str, Any] = {}
    makers: dict[str, Callable[[Any], Any]] = {"in a list": lambda c: [c], "alone": lambda c: c}
    for name, make in makers.items():
        callback = quiet(probe_batches=1)
        fit(package, folder / name, make(callback))
        found[name] = columns(callback)
        found[f"{name}, versions"] = callback.record.run["versions"]
    whole, resumed = quiet(), quiet()
    fit(package, folder, [whole, checkpoints(package, folder)], enable_checkpointing=True)
    fit(package, folder, [resumed], ckpt_path=folder / "step=6.ckpt")
    found["whole"], found["resumed"] = columns(whole), columns(resumed)
    saved = torch.load(folder / "step=6.ckpt", weights_only=True)  # loads though nothing but plain types is allowed
    found["keys"] = [key for key in saved["callbacks"] if "SpeedLimit" in key]
    cli = command_line(package, folder)
    (callback,) = [c for c in cli.trainer.callbacks if type(c).__name__ == "SpeedLimit"]
    found["command line"] = [callback.clock, columns(callback)["step"][-1]]
    found["wrong argument"] = command_line_error(package, folder, "clokc", "lr")
    found["wrong value"] = command_line_error(package, folder, "clock", "hours")
    return found


def main(package: str, folder: Path) -> None:
    (hidden,) = [p.split(".")[0] for p in PACKAGES if p != package]
    sys.modules[hidden] = None  # type: ignore[assignment]  # as if it were not installed
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = seen(package, folder)
    found["said"] = [str(w.message) for w in caught if "SpeedLimit" in str(w.message)]
    found["loaded"] = sorted(m for m in sys.modules if m.split(".")[0] == hidden and m != hidden)
    (folder / "seen.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
