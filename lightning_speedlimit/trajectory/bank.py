"""The sums of the sections that share a device and a dtype: matrices of tile sums, and what runs on."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_speedlimit.trajectory.layout import Scratch, Section, Tile, tiles_of
from lightning_speedlimit.trajectory.sums import RunningSum, sum_dtype, upload

# Rows of a section's running sums; the symbols are those of the theory page.
SUMS = (
    "squares",  # Σ ‖u‖²
    "action",  # Σ ‖u‖²/Δ
    "path_length",  # Σ ‖u‖
    "free_squares",  # Σ ‖u‖², u without decoupled decay
    "work_ito",  # Σ f_k·u_k
    "work_ito_met",  # the same over the steps whose next gradient is known
    "work_anti_ito",  # Σ f_{k+1}·u_k over those steps
    "noise",  # Σ lr_k n_k over those steps
    "noise_weight",  # Σ lr_k over those steps
    "l2_drop",  # −w Σ (θ_k + u_k/2)·u_k = ½w(‖θ_0‖² − ‖θ_K‖²)
    "work_action",  # Σ u²/μ
)
MET = slice(SUMS.index("work_ito_met"), SUMS.index("noise_weight") + 1)  # what the next gradient has to say
WORK_ITO, WORK_ACTION = SUMS.index("work_ito"), SUMS.index("work_action")
BEFORE = ("squares", "force")  # g·g, g_{k+1}·u_k
AFTER = ("squares", "force", "decay", "free", "action")  # u·u, g·u, θ_{k+1}·u, u·u without decay, Σ u²·out


class Bank:
    """The sections of one optimizer on one device in one dtype: they share scratch, tiles and matrices of sums."""

    def __init__(self, dtype: torch.dtype, device: torch.device, size: int) -> None:
        self.dtype, self.device, self.size = dtype, device, size
        self.sections: list[Section] = []
        self.tiles: list[Tile] = []
        self.scratch = Scratch(0, dtype, device)
        self.columns = 0
        self.sums = RunningSum(len(SUMS), 0, device=device)
        self.slot_mobility = RunningSum(1, 0, device=device)  # m of parameters whose coordinates share it
        zero = torch.zeros(0, dtype=sum_dtype(device), device=device)
        self.last_ito, self.last_theta, self.last_rate = (
            zero,
            zero,
            zero,
        )  # of the update that waits to be met
        self._vectors: dict[str, tuple[list[float | Tensor], Tensor]] = {}

    def add(self, section: Section) -> None:
        """Take in a section found mid-run: what was summed stays."""
        self.sections.append(section)
        tiles = tiles_of(section, self.size, self.columns)
        self.tiles += tiles
        self.scratch.fit(max(t.high - t.low for t in tiles))
        self.columns = 1 + max(p.column for t in self.tiles for p in (t, *t.parts))
        self.sums = _widened(self.sums, 1, self.device)
        self.slot_mobility = _widened(self.slot_mobility, len(section.slots), self.device)
        grown = [torch.cat([old, old.new_zeros(1)]) for old in (self.last_ito, self.last_theta, self.last_rate)]
        self.last_ito, self.last_theta, self.last_rate = grown
        self._allocate()

    def _allocate(self) -> None:
        def matrix(rows: int) -> tuple[Tensor, list[list[Tensor]]]:
            values = torch.zeros(rows, self.columns, dtype=self.dtype, device=self.device)
            return values, [list(row.unbind()) for row in values.unbind()]

        self.after, self.after_at = matrix(len(AFTER))
        self.before, self.before_at = matrix(len(BEFORE))
        self.door, self.door_at = matrix(1)
        place = {id(section): i for i, section in enumerate(self.sections)}
        member = torch.zeros(self.columns, len(self.sections), dtype=torch.float64)
        for tile in self.tiles:
            for part in (tile, *tile.parts):
                member[part.column, place[id(tile.section)]] = tile.section.share
        self.member = upload(member.to(sum_dtype(self.device)), self.device)
        self.mark_kinds()

    def mark_kinds(self) -> None:
        """Which columns have one μ for all their coordinates, and which sections have decoupled decay."""
        scalar, decayed = torch.zeros(self.columns), torch.zeros(self.columns)
        for tile in self.tiles:
            for part in (tile, *tile.parts):
                scalar[part.column] = float(tile.section.scalar)
                decayed[part.column] = float(tile.section.travelled is not None)
        self.scalar_plain = upload((scalar * (1 - decayed)).to(self.member.dtype), self.device)
        self.scalar_decayed = upload((scalar * decayed).to(self.member.dtype), self.device)
        self._weights: tuple[Tensor, Tensor] | None = None
        self.zero = self.member.new_zeros(len(self.sections))
        plain = [float(s.travelled is None) for s in self.sections]
        self.plain = upload(torch.tensor(plain, dtype=self.member.dtype), self.device)
        self.all_plain = all(plain)

    def sections_of(self, matrix: Tensor) -> Tensor:
        """Tile sums → section sums, in the running sums' precision."""
        return matrix.to(self.member.dtype) @ self.member

    def free(self, rows: Tensor) -> Tensor:
        """Σ ‖u‖² without decoupled decay, per section, from the section sums of a step."""
        return rows[0] if self.all_plain else rows[3] + rows[0] * self.plain

    def work_action(self, inverse: list[float | Tensor], clip: Tensor | None) -> Tensor:
        """Σ u²/μ per section; `inverse`: 1/numerator of μ per column.

        A scalar μ multiplies Σ u² (a clipped one is c times smaller); a diagonal one is in the row "action".
        """
        weights = self.vector("inverse mobility", inverse)
        if self._weights is None or self._weights[0] is not weights:
            scalar = torch.stack([self.scalar_plain, self.scalar_decayed]) * weights
            self._weights = weights, scalar
        squares = self.after[0::3].to(self.member.dtype) * self._weights[1]  # rows "squares" and "free"
        if clip is not None:
            squares = torch.where(squares == 0, 0.0, squares / clip)
        return (squares.sum(0) + self.after[4] * weights) @ self.member

    def vector(self, name: str, values: list[float | Tensor]) -> Tensor:
        """Numbers as a device vector, rebuilt only when they change, and uploaded without a sync."""
        if any(isinstance(v, Tensor) for v in values):
            new = self.member.new_full
            return torch.stack([v.to(self.member) if isinstance(v, Tensor) else new((), v) for v in values])
        known = self._vectors.get(name)
        if known is None or known[0] != values:
            known = values, upload(torch.tensor(values, dtype=self.member.dtype), self.device)
            self._vectors[name] = known
        return known[1]


def _widened(sums: RunningSum, by: int, device: torch.device) -> RunningSum:
    """The same running sums with `by` more columns of zeros."""
    rows, columns = sums.value.shape
    wide = RunningSum(rows, columns + by, device=device)
    for old, new in zip(sums.parts(), wide.parts(), strict=True):
        new[:, :columns] = old  # on the device: nothing is read
    return wide
