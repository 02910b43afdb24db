"""In a real Trainer: batches between log steps read nothing on the host for the callback's sake.

Seen on the CPU (host_reads.py): what those batches read with the callback is what they read without it, but for the
counters that Adam and its kin keep on the CPU themselves.
"""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from callback_cases import Batch, batches, loader, quiet, trainer
from host_reads import Found, step_counters, watched
from pytorch_lightning.plugins import MixedPrecision
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

pytestmark = pytest.mark.usefixtures("on_a_device")
EVERY = 4  # Lightning logs at batches 3, 7, 11, …


class Model(pl.LightningModule):
    """Reads nothing itself; logs its loss in every step."""

    def __init__(self, make: Any, *, manual: bool = False, width: int = 5) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(4, width), nn.Linear(width, 1)
        self.make, self.automatic_optimization = make, not manual

    def loss(self, batch: Batch) -> Any:
        return nn.functional.mse_loss(self.second(torch.tanh(self.first(batch[0]))), batch[1])

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=True, prog_bar=True)
        if not self.automatic_optimization:
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                self.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()
        return loss.detach() if not self.automatic_optimization else loss

    def configure_optimizers(self) -> Any:
        if not self.automatic_optimization:
            return [self.make(list(part.parameters())) for part in (self.first, self.second)]
        optimizer = self.make(list(self.parameters()))
        schedule = LambdaLR(optimizer, lambda k: 0.99**k)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class First(pl.Callback):
    """Begins to watch at the start of a batch; `Last` ends it and keeps what was found, unless Lightning logs."""

    def __init__(self) -> None:
        self.by_batch: dict[int, list[str]] = {}
        self.found: Found = []
        self.watching: Any = None

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.found = []
        self.watching = watched(self.found)
        self.watching.__enter__()

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        self.watching.__exit__(None, None, None)  # else later tests run under its modes


class Last(pl.Callback):
    def __init__(self, first: First) -> None:
        self.first = first

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.first.watching.__exit__(None, None, None)
        own = set().union(*(step_counters(o) for o in trainer.optimizers))
        if (batch_idx + 1) % EVERY:
            self.first.by_batch[batch_idx] = sorted(name for name, place in self.first.found if place not in own)


def reads(folder: Path, model: Model, options: dict[str, Any], *callbacks: Any) -> dict[int, list[str]]:
    """Batch → what was read in it, for the batches between log steps."""
    first = First()
    options = {name: value() if name == "plugins" else value for name, value in options.items()}
    fit = trainer(folder, first, *callbacks, Last(first), log_every_n_steps=EVERY, **options)
    fit.fit(model, loader(batches(10, dtype=torch.float32)))
    assert fit.global_step
    return first.by_batch


def amp() -> Any:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=16.0))


MAKE: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum, decay": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
}
CLIPPED = {"gradient_clip_val": 0.3}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{name: (name, {}, {}) for name in MAKE},
    "clipped": ("Adam", CLIPPED, {}),
    "clipped by value": ("SGD", CLIPPED | {"gradient_clip_algorithm": "value"}, {}),
    "accumulated": ("Adam", {"accumulate_grad_batches": 2}, {}),
    "bf16-mixed": ("AdamW", {"precision": "bf16-mixed"}, {}),
    "16-mixed": ("SGD", {"plugins": amp}, {}),
    "16-mixed, clipped": ("AdamW", {"plugins": amp, **CLIPPED}, {}),
    "16-mixed, fused": ("AdamW fused", {"plugins": amp}, {}),
    "16-true": ("momentum, decay", {"precision": "16-true"}, {}),
    "monitored": ("SGD", {}, {"monitor": "train_loss"}),
    "per layer, lr clock": ("AdamW", {}, {"per_layer": True, "clock": "lr"}),
    "sampled": ("Adam", {}, {"measure_every_n_steps": 2}),
    "neurons": ("Adam", {}, {"clouds": "neurons"}),
}


# Two optimizers under manual optimization, where Lightning neither clips nor accumulates.
MANUAL = [
    n for n, (_, options, _) in CASES.items() if not options.keys() & {"gradient_clip_val", "accumulate_grad_batches"}
]
QUICK = ("SGD", "AdamW", "16-mixed, fused")
RUNS = [pytest.param(n, False, id=n) for n in CASES] + [
    pytest.param(n, True, id=f"{n}, two optimizers", marks=[] if n in QUICK else [pytest.mark.slow]) for n in MANUAL
]


@pytest.mark.parametrize(("name", "manual"), RUNS)
def test_batches_between_log_steps_read_nothing_more(tmp_path: Path, name: str, manual: bool) -> None:
    kind, options, settings = CASES[name]
    without = reads(tmp_path, Model(MAKE[kind], manual=manual), options)
    callback = quiet(**settings)
    assert reads(tmp_path, Model(MAKE[kind], manual=manual), options, callback) == without
    assert len(without) == 8
    assert callback.record is not None
    assert len(callback.record) >= 2


@pytest.mark.parametrize("options", [{}, CLIPPED, {"plugins": amp}], ids=["plain", "clipped", "amp"])
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_coordinates_are_drawn_at_the_first_step_alone(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    """By its gradient, which is read for that; nothing is read from there on."""
    without = reads(tmp_path, Model(MAKE[kind], width=300), options)
    callback = quiet(coordinates=500)
    found = reads(tmp_path, Model(MAKE[kind], width=300), options, callback)
    assert len(found.pop(0)) > len(without.pop(0))
    assert found == without
    assert callback.record is not None
    assert 0 < callback.record.run["measured_coordinates"] <= 500


@pytest.mark.parametrize("monitored", ["efficiency", "wasserstein2"])
def test_a_monitor_on_its_numbers_reads_nothing_either(tmp_path: Path, monitored: str) -> None:
    """They are announced as NaN from the first batch on."""

    class Waiting(pl.Callback):
        monitor = f"speed_limit/{monitored}"

    without = reads(tmp_path, Model(MAKE["SGD"]), {}, Waiting())
    found = reads(tmp_path, Model(MAKE["SGD"]), {}, quiet(clouds="neurons"), Waiting())
    last = max(found)  # at the epoch's end it measures for the monitor
    assert {k: v for k, v in found.items() if k != last} == {k: v for k, v in without.items() if k != last}


class Curious(pl.Callback):
    """Reads one number in each batch."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        value = module.first.weight.detach().sum()
        if self.how == "synchronize":
            torch.cuda.synchronize()
        else:
            getattr(value, self.how)()


@pytest.mark.parametrize("how", ["item", "cpu", "tolist", "numpy", "__bool__", "__float__", "synchronize"])
def test_the_guard_can_fail(tmp_path: Path, how: str) -> None:
    without = reads(tmp_path, Model(MAKE["SGD"]), {})
    found = reads(tmp_path, Model(MAKE["SGD"]), {}, Curious(how))
    assert all(len(found[k]) > len(without[k]) for k in without)


def test_every_log_step_would_be_seen(tmp_path: Path) -> None:
    """Measuring at every batch instead of at Lightning's log steps."""

    class Eager(type(quiet())):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            super().on_train_batch_end(trainer, module, *args)
            self._measure(trainer, module, log=False)

    eager = Eager(print_summary=False)
    assert reads(tmp_path, Model(MAKE["SGD"]), {}, eager) != reads(tmp_path, Model(MAKE["SGD"]), {})
