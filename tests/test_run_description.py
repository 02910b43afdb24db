"""What a record says of the training beside its numbers: batch norm, schedules, clipping."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_speedlimit import RunRecord, SpeedLimit
from lightning_speedlimit.report import diagnose


class Normed(pl.LightningModule):
    """Two layers of batch norm, one of layer norm; two optimizers' worth of schedules."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.SyncBatchNorm(8), nn.LayerNorm(8), nn.Linear(8, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net[4](self.net[3](self.net[1](self.net[0](x))))  # SyncBatchNorm needs a GPU

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return ((self(batch) - batch.sum(1, keepdim=True)) ** 2).mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 10)
        return [optimizer], [{"scheduler": warm_up, "interval": "step"}]


def test_norms_schedules_and_clipping_are_told(tmp_path: Path) -> None:
    callback = SpeedLimit(print_summary=False, log_figures=False, dirpath=tmp_path / "record")
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_steps=20,
        accumulate_grad_batches=2,
        gradient_clip_val=1e-3,
        log_every_n_steps=2,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = torch.utils.data.DataLoader(torch.randn(64, 4), batch_size=4)  # type: ignore[arg-type]
    trainer.fit(Normed(), data)
    record = RunRecord.load(tmp_path / "record")
    assert record.run["batch_norm_layers"] == 2
    assert record.run["lr_schedules"] == ["LinearLR"]
    assert record.run["gradient_clip_val"] == 1e-3
    (clipping,) = [finding for finding in diagnose(record) if finding.cause == "clipping"]
    assert clipping.evidence["clipped_share"] == 1.0
    assert record.columns["grad_norm_clipped"].max() <= 1.0001e-3
