"""What a reading brings to the host: one collective where there are several processes, and one copy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_speedlimit.checks.guard import warn
from lightning_speedlimit.trajectory import losses
from lightning_speedlimit.trajectory.clipping import LATE, UNTOLD
from lightning_speedlimit.trajectory.motion import Motion
from lightning_speedlimit.trajectory.norms import total
from lightning_speedlimit.trajectory.ranks import MOST, Ranks, Share, alike, header
from lightning_speedlimit.trajectory.recorder import Recorder
from lightning_speedlimit.trajectory.run_totals import COLUMNS, NAMES, NAN, Error, RunTotals, SectionTotals, added
from lightning_speedlimit.trajectory.sketch import BUCKETS, Sketch
from lightning_speedlimit.trajectory.stepwise import Stepwise
from lightning_speedlimit.trajectory.sums import SUMS, RunningSum, sum_dtype
from lightning_speedlimit.trajectory.totals import Table

_NOT_ALIKE = (
    "the processes do not hold the same parameters, or have not taken the same steps: their shards do not add up"
)
_BOTH_WAYS = (
    "some parameter groups descend the loss and others climb it (maximize=True): its difference is no entropy "
    'production; entropy_production="ito" counts the work of each, or measure them with a meter for each'
)
_DISAGREED = (
    "the processes have not taken the same steps, or not each of them has a loss for each (numbers of batches that "
    "differ?): there is no mean over them"
)
_UNFORCED = "weights were moved in a step before which there was no gradient"
NO_SKETCH = (
    "no sketch: a shard's coordinates lie scattered in the whole parameter (tensor parallel by columns, or FSDP's flat "
    "parameters)"
)


class Mail:
    """Collect named tensors on their device; `deliver` brings them all to the host in a single copy."""

    def __init__(self) -> None:
        self._entries: list[tuple[str, Tensor, Share]] = []

    def put(self, name: str, tensor: Tensor, share: Share = "own") -> None:
        """share: how the number of the run follows from those of its processes."""
        self._entries.append((name, tensor.detach(), share))

    def extend(self, other: Mail) -> None:
        """All that the other one has collected."""
        self._entries += other._entries

    def shared(self) -> list[tuple[str, int]]:
        """What other processes must have alike for theirs to add: names and sizes."""
        return [(name, tensor.numel()) for name, tensor, share in self._entries if share != "own"]

    def put_sum(self, name: str, total: RunningSum, share: Share = "own") -> None:
        """A running sum; its correction, where it carries one, travels along and is subtracted on the host."""
        for part in total.parts():
            self.put(name, part, share)

    def deliver(self, ranks: Ranks | None = None, room: int = 0) -> dict[str, Tensor]:
        """float64 host tensors by name; of two entries of one name the second is subtracted from the first.

        Args:
            ranks: the processes to put together; None: this one alone. All of them must call it.
            room: see `Ranks.total`.
        """
        if not self._entries:
            return {}
        entries, home = self._entries, self._entries[0][1].device
        if ranks is not None:
            entries = sorted(entries, key=lambda entry: entry[2] == "own")  # a stable order: what is shared first
        flat = torch.cat([t.to(home, sum_dtype(home), non_blocking=True).reshape(-1) for _, t, _ in entries])
        if ranks is not None:
            shared = sum(t.numel() for _, t, share in entries if share != "own")
            flat = torch.cat([ranks.total(flat[:shared], room), flat[shared:]])
        pieces = torch.split(flat.cpu().double(), [t.numel() for _, t, _ in entries])
        found: dict[str, Tensor] = {}
        for (name, tensor, share), piece in zip(entries, pieces, strict=True):
            value = piece.reshape(tensor.shape)
            if ranks is not None and share == "mean":
                value = value / ranks.size
            found[name] = found[name] - value if name in found else value
        return found


class Reader:
    """Reads what a recorder has followed.

    Args:
        ranks: the processes that train together. sharded: each holds a part of the parameters. per_rate: the clock
            is the learning rate.
    """

    def __init__(self, recorder: Recorder, ranks: Ranks | None, *, sharded: bool, per_rate: bool) -> None:
        self.stepwise = Stepwise()
        self.probe: tuple[Tensor, Tensor] | None = None  # losses at θ_0 and now
        self.coordinates = 0.0, 0.0  # measured, and there; of shards those of all processes at the last reading
        self._recorder, self._followers, self._joint = recorder, recorder.followers, recorder.joint
        self._losses, self._ranks = recorder.losses, ranks
        self._sharded, self._per_rate = sharded, per_rate
        self._processes = ranks.size if sharded and ranks is not None else 1  # that have parts of the whole
        self._share: Share = "sum" if sharded else "own"
        self._sketches: dict[int, Sketch] = {}

    @property
    def scattered(self) -> bool:
        """A shard's coordinates do not lie in one piece of the whole parameter."""
        return any(member.first is None for f in self._followers for m in f.motions for member in m.members)

    @property
    def numbers(self) -> tuple[int | None, int | None]:
        """Coordinates that are measured, and that there are; None where that is not known yet."""
        measured, there = self.coordinates if self._sharded else self._numbers()
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
        collected, tables = self._collected(sketch)
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
            host, tables = {n: v for n, v in host.items() if n in ("losses", "probe")}, []
        self.stepwise.fold(host, self._joint)
        if ranks is not None and agreed and known is not None:
            self._losses.take(host["losses"])
        measured, there = host["coordinates"].tolist() if "coordinates" in host else self._numbers()
        self.coordinates = measured, there
        return host["sketch"].float() if "sketch" in host else None, self._totals(tables, host, agreed=agreed)

    def _totals(self, tables: list[Table], host: dict[str, Tensor], *, agreed: bool) -> RunTotals:
        """agreed: all processes know the same."""
        joint, none = self._joint, torch.zeros(3, dtype=torch.float64, device="cpu")
        sections, errors, untold = list[SectionTotals](), list[Error](), False
        for table in tables:
            own_sections, own_errors, own_untold = table.read(host, uneven=self.stepwise.uneven)
            sections, errors, untold = sections + own_sections, errors + own_errors, untold or own_untold
        loss, no_loss = self._loss_drop(host, agreed=agreed)
        path_length = joint.factor * self.stepwise.path_length
        if self._sharded:
            _shorten(errors, sections, path_length)
        else:
            path_length = added(section.sums["path_length"] for section in sections)
        (measured, there), (steps, lasting, elapsed) = self.coordinates, self._clock(host)
        norms = host.get("whole gradients", host.get("gradients", none[:2] + NAN)).sqrt().tolist()
        moves = torch.stack([none, *(host[f"moves {table.place}"] for table in tables)])
        late = any(follower.changes.late for follower in self._followers)
        unforced = any(float(host[name]) > 0 for name in host if name.startswith("unforced"))
        return RunTotals(
            sections=sections,
            steps=steps,
            measured=joint.measured,
            lasting=lasting,
            elapsed=elapsed if self._per_rate else steps,
            loss=loss,
            no_loss=no_loss,
            gradient_norm=norms[0],
            clipped_norm=norms[1],
            whole_norm="whole gradients" in host,
            step_norm=math.sqrt(float(host.get("squared", NAN))),
            learning_rate=float(host.get("rate", joint.rate)),
            path_length=path_length,
            layer_paths=dict(zip(joint.layers, (joint.factor * host.get("paths", none[:0])).tolist(), strict=False)),
            overlaps=any(table.motion.overlap is not None for table in tables),
            per_rate=self._per_rate,
            coordinates=measured,
            moves=float((moves[:, 0].max() / self._processes).ceil()),  # each process has counted its own
            moved=float(moves[:, 1].sum().sqrt()),
            unkept=bool(moves[:, 2].sum() > 0),
            no_work=_UNFORCED if unforced else LATE if late else UNTOLD if untold else "",
            single=any(table.motion.coordinates.dtype == torch.float32 for table in tables),
            no_formula=tuple(sorted({type(t.motion.optimizer).__name__ for t in tables if t.without_formula()})),
            errors=(*errors, *self.stepwise.errors(sections, joint)),
            sampled=measured < there or joint.every > 1,
            unspread=joint.every > 1 and self.stepwise.sampled < 2,
            no_path=self.stepwise.no_path,
        )

    def _clock(self, host: dict[str, Tensor]) -> tuple[float, float, float]:
        """K, (Σ lr)²/Σ lr² and Σ lr, without what fused optimizers left out."""
        joint, none = self._joint, torch.zeros(2, dtype=torch.float64, device="cpu")
        (skipped, skipped_time), (rates, squares) = (host.get(n, none).tolist() for n in ("skipped", "rate_sum"))
        steps, elapsed, squares = joint.steps - skipped, joint.elapsed + rates, joint.rate_squares + squares
        alike = elapsed * elapsed / squares / joint.steps if squares > 0.0 else 1.0
        time = NAN if joint.several_rates else elapsed - skipped_time
        return steps, steps * alike if math.isfinite(alike) else steps, time

    def _loss_drop(self, host: dict[str, Tensor], *, agreed: bool) -> tuple[losses.LossDrop | None, str]:
        """L_0 − L_K, of the probe where there is one, and why there is none."""
        if not agreed:
            return None, _DISAGREED
        # The loss is maximized where it says so: of the groups that are measured, of all before the first is.
        groups = [run.group for f in self._followers for m in f.motions for run in m.runs.current(m.missing)]
        groups = groups or [group for f in self._followers for group in f.optimizer.param_groups]
        climbs = {bool(group.get("maximize", False)) for group in groups} or {False}
        if len(climbs) > 1:
            return None, _BOTH_WAYS
        if "probe" in host:
            found = losses.paired_drop(host["probe"])
        elif "losses" in host:
            found = losses.drop(*self._losses.windows(host["losses"]), self._joint.steps)
        else:
            return None, ""
        return replace(found, value=-found.value if climbs.pop() else found.value), ""

    # -- to the host -----------------------------------------------------------------------------------------

    def _collected(self, sketch: bool) -> tuple[Mail, list[Table]]:
        """Where other processes wait for this one in the collective, its faults end the measurement."""
        if self._recorder.failure is None:
            try:
                with self._recorder.changing():
                    return self._collect(sketch=sketch)
            except Exception as error:
                self._recorder.stop(error)
        return Mail(), []

    def _collect(self, *, sketch: bool) -> tuple[Mail, list[Table]]:
        """All that the motions and joint steps have to tell."""
        mail, tables, share, joint = Mail(), list[Table](), self._share, self._joint
        sketching = sketch and not self.scattered
        for f, follower in enumerate(self._followers):
            for m, motion in enumerate(follower.motions):
                buckets = self._sketch_of(motion) if sketching else None
                table = Table((f, m), follower, joint.factor, buckets, sharded=self._sharded)
                tables.append(table)
                mail.put(f"values {table.place}", table.values, share)
                mail.put_sum(f"moves {table.place}", motion.moves.sums, share)
                for group, matrix in table.covariances.items():
                    mail.put(f"covariance {table.place} {group}", matrix, share)
            if follower.changes.stats is not None:
                mail.put(f"changes {f}", follower.changes.stats, share)
            if follower.unforced is not None:
                mail.put(f"unforced {f}", follower.unforced, share)
        if self._sharded:
            mail.put("coordinates", torch.tensor(self._numbers(), dtype=torch.float64, device="cpu"), "sum")
        if found := [Sketch.signed(table.sketch) for table in tables if table.sketch is not None]:
            mail.put("sketch", total(found), share)
        self._put_norms(mail)
        for name, running in joint.sums.items():
            mail.put_sum(name, running)
        for name, kept in (("rows", joint.rows), ("samples", joint.samples)):
            if kept is not None and kept.rows is not None:
                mail.put(name, kept.rows, share)
        if isinstance(joint.rate, Tensor):
            mail.put("rate", joint.rate)
        return mail, tables

    def _sketch_of(self, motion: Motion) -> Sketch:
        if id(motion) not in self._sketches:
            self._sketches[id(motion)] = Sketch(motion.coordinates, motion.members)
        return self._sketches[id(motion)]

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


def _shorten(errors: Sequence[Error], sections: Sequence[SectionTotals], path_length: float) -> None:
    """Each process knows the errors of Σ ‖u of its part‖. What they do to Σ ‖u‖ is less, by the ratio of these."""
    own = sum(section.sums["path_length"] for section in sections)
    for error in errors:
        for changes in error.values():
            changes[NAMES.index("path_length")] *= path_length / own if own else 0.0
