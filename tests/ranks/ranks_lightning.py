"""Trainings by Lightning's Trainer in one process or in several; apart from the tests, for processes to import."""

import json
import os
import sys
import warnings
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from ranks_cases import Collectives, Net, loss_of, parts
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_speedlimit import RunRecord, SpeedLimit

BATCHES = 11
EPOCHS = 2
LOG_EVERY = 4  # does not divide the batches: epochs end between log steps


class Module(pl.LightningModule):
    """Takes its process's part of each batch; a process alone takes all parts, and their mean loss.

    fails_at: the step in which the second process raises an error. stops_at: in which either asks to stop.
    refuses_at: from which step on the second process refuses to be evaluated without gradients.
    """

    def __init__(
        self,
        *,
        fails_at: int | None = None,
        stops_at: tuple[int, int] | None = None,
        refuses_at: float = float("inf"),
    ) -> None:
        super().__init__()
        self.net = Net()
        self.fails_at, self.stops_at, self.refuses_at = fails_at, stops_at, refuses_at

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_rank == 1 and self.global_step >= self.refuses_at and not torch.is_grad_enabled():
            raise ArithmeticError("no gradients on the second process")
        if self.global_rank == 1 and self.global_step == self.fails_at:
            raise ArithmeticError("on the second process alone")
        if self.stops_at and self.global_step == self.stops_at[self.global_rank]:
            self.trainer.should_stop = True
        mine = batch if self.trainer.world_size == 1 else [batch[self.global_rank]]
        loss = sum((loss_of(self.net, part) for part in mine), torch.zeros(())) / len(mine)
        self.log("train_loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(list(parts(BATCHES)), batch_size=None)  # type: ignore[arg-type]


class Witness(pl.Callback):
    """Writes down what its process saw: how often the record was written and what was sent between processes."""

    def __init__(self, folder: Path, speed_limit: SpeedLimit | None) -> None:
        self.folder, self.speed_limit = folder, speed_limit
        self.saves = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        saved = RunRecord.save

        def counted(record: RunRecord, path: Any) -> Any:
            self.saves += 1
            return saved(record, path)

        RunRecord.save = counted  # type: ignore[method-assign]
        self.restore = lambda: setattr(RunRecord, "save", saved)
        self.sent = Collectives()
        self.sent.__enter__()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.sent.__exit__(None, None, None)
        self.restore()
        record = self.speed_limit.record if self.speed_limit else None
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        rows = [] if record is None else record.columns["step"].tolist()
        seen = {"saves": self.saves, "sent": self.sent.count, "metrics": metrics, "rows": rows}
        (self.folder / f"witness-{trainer.global_rank}.json").write_text(json.dumps(seen))


class Talkative(SpeedLimit):
    """Sends one number more with each row."""

    def _measure(self, *args: Any, **kwargs: Any) -> None:
        super()._measure(*args, **kwargs)
        dist.all_reduce(torch.ones(1))


class Unable(SpeedLimit):
    """Begins to measure so often in the second process, and then can't; the optimizers are replaced midway."""

    def __init__(self, beginnings: int) -> None:
        super().__init__(print_summary=False)
        self.left = beginnings

    def _measure_anew(self, trainer: Any, *args: Any) -> None:
        self.left -= 1
        unable = trainer.global_rank == 1 and self.left < 0
        fault = mock.patch(
            "lightning_speedlimit.callback.measuring.Measurement", side_effect=MemoryError("on one alone")
        )
        with fault if unable else nullcontext():
            super()._measure_anew(trainer, *args)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == LOG_EVERY + 1:
            trainer.optimizers = [pl_module.configure_optimizers()]
        super().on_train_batch_start(trainer, pl_module, *args)


class Forgetful(SpeedLimit):
    """Can't go on from a checkpoint in the second process."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        damaged = dist.get_rank() == 1
        super().load_state_dict({"meter": 1} if damaged else state_dict)


def speed_limit(**options: Any) -> SpeedLimit:
    return SpeedLimit(**({"print_summary": False, "log_figures": False, "loss_window": 5} | options))


def fit(folder: Path, callback: SpeedLimit | bool = True, model: Module | None = None, **options: Any) -> Any:
    """One fit with the usual monitors on our values; `callback=False`: without ours, on the loss."""
    ckpt = options.pop("ckpt_path", None)
    ours = speed_limit() if callback is True else callback or None
    watched = "speed_limit/path_length" if ours else "train_loss"
    folder.mkdir(parents=True, exist_ok=True)
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": folder,
        "logger": CSVLogger(folder, name="", version="run"),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "log_every_n_steps": LOG_EVERY,
        "max_epochs": EPOCHS,
    }
    monitors = [
        EarlyStopping(watched, mode="max", patience=50),
        ModelCheckpoint(folder, monitor=watched, mode="max", filename="{epoch}", save_top_k=-1),
    ]
    callbacks = [*([ours] if ours else []), Witness(folder, ours), *monitors]
    trainer = pl.Trainer(callbacks=callbacks, **(defaults | options))
    trainer.fit(model or Module(), ckpt_path=ckpt)
    return trainer


def ddp(start: str = "popen") -> DDPStrategy:
    """Where one waits for another that does not come, it ends."""
    patience = timedelta(seconds=120)
    return DDPStrategy(process_group_backend="gloo", start_method=start, timeout=patience)  # type: ignore[arg-type]


class Sharded(Module):
    """What ModelParallelStrategy asks of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net(12)

    def configure_model(self) -> None:
        mesh = self.device_mesh
        assert mesh is not None
        if mesh["data_parallel"].size() > 1:
            fully_shard(self.net, mesh=mesh["data_parallel"])
            return
        plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
        parallelize_module(self.net, mesh["tensor_parallel"], plan)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        mesh = self.device_mesh
        if mesh is not None and mesh["data_parallel"].size() == 1:  # both processes see all batches
            loss = sum((loss_of(self.net, part) for part in batch), torch.zeros(())) / len(batch)
            self.log("train_loss", loss.detach())
            return loss
        return super().training_step(batch, batch_idx)


def try_sharded(folder: Path, way: str) -> None:
    sizes = {"data_parallel_size": 1, "tensor_parallel_size": 1, way: 2}
    strategy = ModelParallelStrategy(**sizes, process_group_backend="gloo", save_distributed_checkpoint=False)
    callback = speed_limit(clouds="neurons", probe_batches=2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(folder, callback, Sharded(), devices=2, strategy=strategy)
    text = [str(w.message) for w in said if "SpeedLimit" in str(w.message)]
    (folder / f"said-{os.environ['RANK']}.json").write_text(json.dumps(text))


def launched(rank: int, folder: str, port: int) -> None:
    """What torchrun's environment tells a process, and several fits in it."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
    }
    root = Path(folder)

    def two(name: str, *given: Any, **options: Any) -> None:
        fit(root / name, *given, devices=2, strategy=ddp(), **options)

    two("plain")
    two("probe", speed_limit(probe_batches=3))
    two("refused", speed_limit(probe_batches=3), Module(refuses_at=9))
    two("clouds", speed_limit(clouds="neurons", per_layer=True))
    two("talkative", Talkative(print_summary=False))
    two("without", False)

    def heard(name: str, *given: Any, **options: Any) -> None:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            two(name, *given, **options)
        text = [str(w.message) for w in said if "SpeedLimit" in str(w.message)]
        (root / name / f"said-{rank}.json").write_text(json.dumps(text))

    for beginnings in range(2):
        heard(f"unable {beginnings}", Unable(beginnings))
    forgetful = Forgetful(print_summary=False, log_figures=False)
    heard("forgotten", forgetful, ckpt_path=root / "plain" / "epoch=0.ckpt")
    two("stopped", model=Module(stops_at=(8, 6)), min_epochs=2, max_epochs=4)
    two("resumed", ckpt_path=root / "plain" / "epoch=0.ckpt")
    try_sharded(root / "fully sharded", "data_parallel_size")
    try_sharded(root / "tensor parallel", "tensor_parallel_size")
    try:
        two("fails", model=Module(fails_at=9))
    except Exception as error:
        (root / "fails" / f"error-{rank}.txt").write_text(f"{type(error).__name__}: {error}")


if __name__ == "__main__":  # a script that Lightning launches once more for the second process
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    fit(Path(sys.argv[1]), devices=2, strategy=ddp())
