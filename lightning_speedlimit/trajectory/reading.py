"""What a reading brings to the host: one collective where there are several processes, and one copy."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_speedlimit.checks.guard import warn
from lightning_speedlimit.trajectory.assembly import assembled
from lightning_speedlimit.trajectory.mail import Mail
from lightning_speedlimit.trajectory.norms import total
from lightning_speedlimit.trajectory.ranks import MOST, Ranks, Share, alike, header
from lightning_speedlimit.trajectory.recorder import Recorder
from lightning_speedlimit.trajectory.run_totals import RunTotals
from lightning_speedlimit.trajectory.sketch import BUCKETS, Sketch
from lightning_speedlimit.trajectory.stepwise import Stepwise
from lightning_speedlimit.trajectory.sums import SUMS
from lightning_speedlimit.trajectory.totals import COLUMNS, Part, Table

_NOT_ALIKE = (
    "the processes do not hold the same parameters, or have not taken the same steps: their shards do not add up"
)
NO_SKETCH = (
    "no sketch: a shard's coordinates lie scattered in the whole parameter (tensor parallel by columns, or FSDP's flat "
    "parameters)"
)


class Reader:
    """Reads what a recorder has followed.

    Args:
        ranks: the processes that train together. sharded: each holds a part of the parameters. per_rate: the clock
            is the learning rate.
    """

    def __init__(self, recorder: Recorder, ranks: Ranks | None, *, sharded: bool, per_rate: bool) -> None:
        self.stepwise = Stepwise()
        self.probe: tuple[Tensor, Tensor] | None = None  # losses at θ_0 and now
        self.coordinates: tuple[float, float] | None = None  # of shards, as of the last reading: of all processes
        self._recorder, self._followers, self._joint = recorder, recorder.followers, recorder.joint
        self._losses, self._ranks = recorder.losses, ranks
        self._sharded, self._per_rate = sharded, per_rate
        self._share: Share = "sum" if sharded else "own"
        self._sketches: dict[int, Sketch] = {}

    @property
    def scattered(self) -> bool:
        """A shard's coordinates do not lie in one piece of the whole parameter."""
        return any(member.first is None for f in self._followers for m in f.motions for member in m.members)

    @property
    def numbers(self) -> tuple[int | None, int | None]:
        """Coordinates that are measured, and that there are; None where that is not known yet."""
        measured, there = (self.coordinates if self._sharded else self._numbers()) or (0.0, 0.0)
        return (round(measured), round(there)) if there else (None, None)

    def _numbers(self) -> tuple[float, float]:
        """Of this process; what several processes hold alike counts once in all."""
        measured = there = 0.0
        for coordinates in (motion.coordinates for follower in self._followers for motion in follower.motions):
            for shape, share, own in zip(coordinates.shapes, coordinates.shares, coordinates.numbers, strict=True):
                measured, there = measured + share * own, there + share * shape.numel()
        return measured, there

    def read(self, *, sketch: bool) -> tuple[Tensor | None, RunTotals]:
        """The sketch where it is asked for, and the totals: one collective and one copy."""
        collected, parts = self._collected(sketch)
        mail, ranks, known = Mail(), self._ranks, self._losses.tensor
        if ranks is not None:
            mail.put("header", header(self._recorder.failure is not None, self._facts(collected), self._device), "sum")
        mail.extend(collected)
        if known is not None:
            mail.put("losses", known, "mean")
        if self.probe is not None:
            mail.put("probe", torch.stack(self.probe), "mean")
        host = mail.deliver(ranks, self._room(sketch))
        agreed = ranks is None or alike(host["header"], ranks.size)
        if self._sharded:
            self._agree(host, agreed)
        if self._recorder.failure is not None:
            host, parts = {n: v for n, v in host.items() if n in ("losses", "probe")}, []
        self.stepwise.fold(host, self._joint)
        if ranks is not None and agreed and known is not None:
            self._losses.take(host["losses"])
        here = tuple(host["coordinates"].tolist()) if "coordinates" in host else self._numbers()
        self.coordinates = here[0], here[1]
        processes = ranks.size if self._sharded and ranks is not None else 0
        totals = assembled(
            parts, host, self._joint, self.stepwise, self._losses, self._followers,
            agreed=agreed, per_rate=self._per_rate, processes=processes, coordinates=self.coordinates,
        )  # fmt: skip
        return host["sketch"].float() if "sketch" in host else None, totals

    # -- to the host -----------------------------------------------------------------------------------------

    def _collected(self, sketch: bool) -> tuple[Mail, list[Part]]:
        """Where other processes wait for this one in the collective, its faults end the measurement."""
        if self._recorder.failure is not None:
            return Mail(), []
        try:
            with self._recorder.changing():
                return self._collect(sketch=sketch)
        except Exception as error:
            self._recorder.stop(error)
            return Mail(), []

    def _collect(self, *, sketch: bool) -> tuple[Mail, list[Part]]:
        """All that the motions and joint steps have to tell."""
        mail, parts, share, joint = Mail(), list[Part](), self._share, self._joint
        sketches = self._sketches if sketch and not self.scattered else None
        for f, follower in enumerate(self._followers):
            for m, motion in enumerate(follower.motions):
                if sketches is not None and id(motion) not in sketches:
                    sketches[id(motion)] = Sketch(motion.coordinates, motion.members)
                buckets = None if sketches is None else sketches[id(motion)]
                table = Table(motion, joint.factor, buckets, current=follower.took_part)
                if self._sharded:  # a process may hold small parameters alone, and draw nothing of them
                    none = motion.coordinates.weights.new_zeros(len(COLUMNS), len(COLUMNS))
                    table.covariances = {member.group: none for member in motion.members} | table.covariances
                parts.append(Part(f"{f} {m}", f"{f}", follower.changes, type(follower.optimizer).__name__, table))
            if follower.changes.stats is not None:
                mail.put(f"changes {f}", follower.changes.stats, share)
            if follower.unforced is not None:
                mail.put(f"unforced {f}", follower.unforced, share)
        for part in parts:
            part.put(mail, share)
        if self._sharded:
            mail.put("coordinates", torch.tensor(self._numbers(), dtype=torch.float64), "sum")
        found = [Sketch.signed(part.table.sketch) for part in parts if part.table.sketch is not None]
        if found:
            mail.put("sketch", torch.stack([b.to(found[0].device) for b in found]).sum(0), share)
        self._put_norms(mail)
        for name in ("skipped", "rate_sum", "paths"):
            if (total := getattr(joint, name)) is not None:
                mail.put_sum(name, total)
        for name in ("rows", "samples"):
            rows = getattr(joint, name)
            if rows is not None and rows.rows is not None:
                mail.put(name, rows.rows, share)
        if isinstance(joint.rate, Tensor):
            mail.put("rate", joint.rate)
        return mail, parts

    def _put_norms(self, mail: Mail) -> None:
        took_part = [f for f in self._followers if f.took_part and f.motions]
        if took_part:
            mail.put("gradients", total([n for f in took_part if (n := f.norms()) is not None]), self._share)
        drawn = any(not m.coordinates.exact for f in took_part for m in f.motions)
        if drawn and not self._sharded:
            whole = [n for f in took_part if (n := f.norms_of_all()) is not None]
            if len(whole) == len(took_part):
                mail.put("whole gradients", total(whole))
        if self._joint.squared is not None:
            mail.put("squared", self._joint.squared, self._share)

    def _room(self, sketch: bool) -> int:
        """No process has more numbers to tell; from what one that has failed knows, too."""
        numbers = 3 + 4 * self._losses.size + (0 if self.probe is None else 2 * self.probe[0].numel())
        if not self._sharded:
            return numbers
        parameters = sum(len(group["params"]) for f in self._followers for group in f.optimizer.param_groups)
        each = len(COLUMNS) ** 2 + len(COLUMNS) + 3
        steps = (len(SUMS) + 4) * min(MOST, self._joint.steps - self._joint.read_at)
        return numbers + each * parameters + 5 + 7 * len(self._followers) + steps + (BUCKETS if sketch else 0)

    # -- several processes -----------------------------------------------------------------------------------

    def _facts(self, mail: Mail) -> object:
        """What all processes must know alike, for their losses and their shards to be of the same steps."""
        probe = None if self.probe is None else self.probe[0].numel()
        shards = mail.shared() if self._sharded else None
        return self._joint.steps, self._losses.steps, self._losses.tensor is None, probe, shards

    @property
    def _device(self) -> torch.device:
        found: Tensor = next(p for f in self._followers for g in f.optimizer.param_groups for p in g["params"])
        return found.device

    def _agree(self, host: dict[str, Tensor], agreed: bool) -> None:
        failed = float(host["header"][0]) > 0
        if self._recorder.failure is None and (failed or not agreed):
            self._recorder.failure = "another process could not measure" if failed else _NOT_ALIKE
            warn(f"{self._recorder.failure}. The training goes on", stacklevel=4)
