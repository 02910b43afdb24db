"""A GPT-2 of one layer in the real Trainer, and copies of its weights, gradients and losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from optimizer_cases import EXACT, KINEMATIC, WORKS, Copies
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from lightning_speedlimit import RunRecord
from lightning_speedlimit.integrations.transformers import SpeedLimitCallback

STEPS, WORDS, LENGTH, BATCH = 12, 32, 8, 4


def model(seed: int = 0, dtype: torch.dtype = torch.float64, dropout: float = 0.1) -> Any:
    torch.manual_seed(seed)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": WORDS, "n_positions": LENGTH}
    words = {"bos_token_id": 0, "eos_token_id": 0}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return GPT2LMHeadModel(GPT2Config(**sizes, **words, **drops)).to(dtype)


def texts(count: int = 64) -> list[dict[str, Tensor]]:
    """Random walks through the words: something to learn."""
    draw = torch.Generator().manual_seed(1)
    walks = (torch.randint(0, 3, (count, LENGTH), generator=draw).cumsum(1) + torch.arange(count)[:, None]) % WORDS
    return [{"input_ids": walk, "labels": walk} for walk in walks]


def arguments(folder: Path, **more: Any) -> Any:
    settings = {"max_steps": STEPS, "logging_steps": 4, "per_device_train_batch_size": BATCH, "learning_rate": 0.01}
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "seed": 3}
    return TrainingArguments(output_dir=str(folder), **{**settings, **quiet, **more})


class Witness(TrainerCallback):
    """Copies of θ about each step; the Trainer below adds the raw gradients and the losses."""

    def __init__(self, network: Any) -> None:
        self.copies = Copies(network.parameters())
        self.losses: list[float] = []

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.copies.before.append(self.copies.weights())

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.copies.after.append(self.copies.weights())


class Witnessed(Trainer):
    witness: Witness
    _sum = 0.0

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        self._sum += float(loss)
        if self.accelerator.sync_gradients:
            self.witness.copies.raw.append(self.witness.copies.gradient())
            self.witness.losses.append(self._sum)
            self._sum = 0.0
        return loss


def trained(folder: Path, *, measured: bool = True, resume: Any = None, **more: Any) -> Any:
    """The Trainer after its training, with `witness` and `measured`."""
    made = {"optimizers": more.pop("optimizers")} if "optimizers" in more else {}
    network = more.pop("network", None) or model()
    if callable(made.get("optimizers")):
        made["optimizers"] = (made["optimizers"](network.parameters()), None)
    settings = more.pop("callback", {})
    trainer = Witnessed(network, arguments(folder, **more), train_dataset=texts(), eval_dataset=texts(8), **made)
    trainer.witness, trainer.measured = Witness(network), None
    trainer.add_callback(trainer.witness)
    if measured:
        trainer.measured = SpeedLimitCallback(trainer, print_summary=False, **settings)
        trainer.add_callback(trainer.measured)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_right(trainer: Any, names: tuple[str, ...] = (*KINEMATIC, *WORKS), rel: float = EXACT) -> RunRecord:
    record = trainer.measured.record
    columns, wanted = record.columns, trainer.witness.copies.values()
    for name in names:
        assert columns[name][-1] == pytest.approx(wanted[name], rel=rel), name
    return record
