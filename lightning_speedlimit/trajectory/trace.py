"""One optimizer's steps, measured: what is read before a step and what after it; all sums stay on the device.

Bytes that each float32 parameter moves per step: gradient and held update for f_{k+1}·u_k (8), θ into the
buffer (8), θ, buffer and gradient for u, ‖u‖² and f_k·u_k (16): 32. A diagonal mobility reads and writes m and
reads its denominator (12 more); decoupled decay reads and writes one more buffer (8 more).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_speedlimit.trajectory import mobility
from lightning_speedlimit.trajectory.bank import MET, WORK_ITO, Bank
from lightning_speedlimit.trajectory.layout import (
    Cuts,
    Section,
    Slot,
    Tile,
    compute_dtype,
    dot,
    stretch,
    tile_size,
)
from lightning_speedlimit.trajectory.shards import first_coordinate, gradient_of, is_flat, local, replication
from lightning_speedlimit.trajectory.sums import sum_dtype

_KEPT = ("held", "mobility", "travelled", "response")  # what a resumed measurement cannot do without
_GONE = -1  # the place of a parameter that has left the optimizer
_GUARDED_STEPS = 2  # a copy of θ is kept over the first steps: moves that repeat at every step show there

Scalar = float | Tensor


class OptimizerTrace:
    """What one optimizer does, step by step: `observe` → `before_update` → (the update) → `finish`.

    Args:
        momentum_mobility: "steady" or "response".
        keep_raw_gradient: gradients will be changed by more than a factor before the step (clipping by value).
        watch_clipping: norms are taken parameter by parameter, to tell clipping by one factor from other.
        per_rate: the action's clock is the learning rate.
        sampled: not every step is measured; `travelled` then holds Σ lr w θ_k over the measured ones.
        place: hands out the position of a new parameter in the whole run's parameter vector.
        layer_of: the name under which a parameter's sums are kept apart, or None.
        processes: that hold shards of the parameters; 0: this one holds them whole.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        momentum_mobility: mobility.MomentumMobility,
        keep_raw_gradient: bool,
        watch_clipping: bool,
        per_rate: bool,
        sampled: bool,
        place: Callable[[Tensor], int],
        layer_of: Callable[[Tensor], str] | None,
        processes: int = 0,
    ) -> None:
        self.optimizer = optimizer
        self.slots: list[Slot] = []
        self.sections: list[Section] = []
        self.banks: dict[tuple[torch.dtype, torch.device], Bank] = {}
        self.steps = 0
        self.moves = 0  # moves outside of step that could not be taken out
        self.moves_removed = 0
        self._moves_repeat = False
        self.silent: Tensor | None = None  # squared size of moves that no version shows
        self.uneven: Tensor | None = None  # how far clipping was from one factor for all, as a ratio of squares
        self.in_step = False
        self.observed = False
        self._response = momentum_mobility == "response"
        self._per_rate = per_rate
        self.sampled = sampled
        self._value_clipping = keep_raw_gradient
        self._watches = watch_clipping and not keep_raw_gradient
        # Gradients are copied where they may be gone after the step: an optimizer that evaluates them more than
        # once, and one from elsewhere until its first step has shown that it leaves them alone.
        self._repeats = isinstance(optimizer, torch.optim.LBFGS)
        self._unknown = not type(optimizer).__module__.startswith("torch.optim")
        self._place, self._layer_of = place, layer_of
        self._processes = processes
        self.blind: Tensor | None = None  # steps in which the shards had no gradient to tell the clip factor by
        self._seen: dict[int, Slot | None] = {}
        self._section_of: list[Section] = []
        self._gone: set[int] = set()  # slots whose parameter has left the optimizer
        self._members: list[list[int]] = []  # of its groups, when last looked at
        self._met = False  # `held` holds an update that no gradient has met
        self._meeting_now = False
        self._saved = False
        self._arrived = False
        self._empty = True
        self._work: list[tuple[Bank, list[Tile]]] = []
        self._grads: list[Tensor | None] = []
        self._marks: list[tuple[int, int]] = []
        self._scale: Scalar | None = None
        self._clip: Tensor | None = None

    @property
    def keeps_raw(self) -> bool:
        return self._value_clipping or self._repeats or self._unknown

    # -- before the update -----------------------------------------------------------------------------------

    def observe(self, *, measure: bool, scale: Scalar | None = None) -> None:
        """The gradients are raw now: ‖g‖ and f_{k+1}·u_k. Within a step the first call counts, before it the last.

        Args:
            measure: the step will be measured. scale: what the gradients are multiplied by (a loss scaler's).
        """
        if self.observed and self.in_step:
            return
        self.observed = True
        self._follow_groups()
        self._discover()
        self._saved, self._arrived, self._scale, self._clip = False, False, scale, None
        self._grads = [None if slot.index in self._gone else gradient_of(slot.parameter) for slot in self.slots]
        self._marks = _marks(self._grads)
        self._empty = all(g is None for g in self._grads)
        self._meeting_now = self._met and not self._empty
        self._work = []
        if self._empty or not (measure or self._met):
            return
        cuts: Cuts = {}
        for bank in self.banks.values():
            bank.before.zero_()
            self._work.append((bank, self._resolve(bank)))
            for tile in self._finer(self._work[-1][1]):
                self._meet(bank, tile, cuts)

    @property
    def has_moved(self) -> bool:
        """Within a step: the update has begun to move weights."""
        return self.in_step and self.observed and any(s.parameter._version != s.version for s in self.slots)

    def holds_observed(self) -> bool:
        """The gradients that were observed are still there: changed in place at most."""
        here = (s for s in zip(self.slots, self._grads, strict=False) if s[0].index not in self._gone)
        same = all(gradient_of(slot.parameter) is seen for slot, seen in here)
        return self.observed and bool(self._grads) and same

    def repeated(self) -> bool:
        """A hook for a step that has begun already: a subclass calls its parent's `step`, and torch hooks both."""
        return self.in_step and self.holds_observed() and _marks(self._grads) == self._marks

    def _marks_tell(self) -> bool:
        """Whether gradients that were changed in place show it.

        What is done to a DTensor may leave no mark, and a shard of no element has none to show; nor do foreach
        operations (clipping is one) while a TorchDispatchMode, like FlopCounterMode, sees the operations.
        """
        return not self._processes and not torch._C._len_torch_dispatch_stack()

    def has_new_gradients(self) -> bool:
        """A gradient has appeared or changed since the last look."""
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        now = [(id(p.grad), p.grad._version) for p in params if p.grad is not None]
        return bool(now) and not (self.observed and now == [m for m in self._marks if m != (0, 0)])

    def _meet(self, bank: Bank, tile: Tile, cuts: Cuts) -> None:
        gradient = tile.gather(bank.scratch, "gradient", self._gradients(tile), cuts)
        dot(gradient, gradient, bank.scratch, bank.before_at[0][tile.column])
        if self._met:
            dot(gradient, tile.own("held"), bank.scratch, bank.before_at[1][tile.column])
        if self.keeps_raw:
            if tile.section.raw is None:
                tile.section.raw = tile.section.zeros()
            tile.own("raw").copy_(gradient)

    def before_update(self, *, measure: bool) -> None:
        """Just before the update: moves since the last step are looked for, and θ_k goes into the buffer."""
        if self._saved or not self.observed:
            return
        self.check_moves()
        if self._empty or not measure:
            return
        self._saved = True
        if self._met:
            self._clear_idle()
        for section in self.sections:
            self._follow_decay(section)
        valid = self._valid()
        for bank, tiles in self._work:
            for tile in tiles:
                waiting = None if valid is None else _kept(bank, tile)
                tile.load("held", tile.tensors, bank.scratch)
                if waiting is not None and valid is not None:
                    torch.where(valid, tile.own("held"), waiting, out=tile.own("held"))
                if tile.section.before is not None:
                    self._load_before(bank, tile)

    def _valid(self) -> Tensor | None:
        """False, on the device, where a fused optimizer found inf and leaves θ alone; None where it cannot.

        The update that waits for the next gradient then goes on waiting in `held`.
        """
        found = getattr(self.optimizer, "found_inf", None)
        return (found == 0).reshape(()) if isinstance(found, Tensor) else None

    def _load_before(self, bank: Bank, tile: Tile) -> None:
        formula = tile.section.formula
        name = "" if formula is None else formula.before
        states = [self.optimizer.state.get(s.parameter, {}).get(name) for s in tile.slots]
        if all(isinstance(s, Tensor) for s in states):
            tile.load("before", states, bank.scratch)
        else:
            tile.own("before").zero_()

    def _clear_idle(self) -> None:
        """A parameter without a gradient met its last update with a force of 0: nothing of it is left to meet."""
        for slot, gradient in zip(self.slots, self._grads, strict=True):
            if gradient is None:
                section = self._section_of[slot.index]
                section.held[slot.offset : slot.offset + slot.numel].zero_()

    def _follow_decay(self, section: Section) -> None:
        """Decoupled decay that was switched on after the start: from here on Σ u is kept apart from θ − θ_0."""
        section.read_decay()
        if section.travelled is None and section.decoupled:
            section.travelled = section.zeros() if self.sampled else section.snapshot().sub_(section.start)
            self._bank(section).mark_kinds()

    def at_the_door(self) -> None:
        """The gradients are what the optimizer will use: the clip factor c = ‖g_clipped‖/‖g‖, if they changed."""
        if self._arrived or not self._work:
            return
        self._arrived = True
        if self._marks_tell() and _marks(self._grads) == self._marks:
            return
        self._marks = _marks(self._grads)
        cuts: Cuts = {}
        clipped: Tensor | None = None
        raw: Tensor | None = None
        uneven: Tensor | None = None
        for bank, tiles in self._work:
            bank.door.zero_()
            for tile in self._finer(tiles):
                gradient = tile.gather(bank.scratch, "gradient", self._gradients(tile), cuts)
                dot(gradient, gradient, bank.scratch, bank.door_at[0][tile.column])
                tile.section.effective |= self._value_clipping
            clipped = _plus(clipped, bank.door.sum(dtype=bank.member.dtype))
            raw = _plus(raw, bank.before[0].sum(dtype=bank.member.dtype))
            # half-precision gradients round and underflow on their way through one factor
            if all(s.parameter.dtype.itemsize >= 4 for section in bank.sections for s in section.slots):
                uneven = _plus(uneven, _unevenness(bank.door[0], bank.before[0]))
        assert clipped is not None
        assert raw is not None
        if uneven is not None and not self.keeps_raw:
            self.uneven = uneven if self.uneven is None else torch.maximum(self.uneven, uneven)
        self._clip = torch.where(raw > 0, (clipped / raw).sqrt(), torch.ones_like(raw))
        if self._processes:
            self.blind = _plus(self.blind, (raw <= 0).to(raw.dtype))

    # -- after the update ------------------------------------------------------------------------------------

    def finish(self, learning_rates: list[Scalar]) -> dict[str, Tensor] | None:
        """The step's sums go into the running ones; returns its totals for the joint step.

        Totals: `sums` (in the order of bank.SUMS), `norms` (‖g‖² before and after clipping), and `valid` (0 where
        a fused optimizer found inf and left θ alone; absent where it cannot). None where the step was not
        measured.
        """
        totals: dict[str, Tensor] | None = None
        if self._saved:
            totals = self._measure(learning_rates)
        elif self._meeting_now:
            for bank, _ in self._work:
                rows = torch.zeros_like(bank.sums.value)
                rows[MET] = torch.stack(self._meeting(bank))
                valid = self._valid()
                bank.sums.add_(rows if valid is None else torch.where(valid, rows, torch.zeros_like(rows)))
        if not self._empty:
            self._met = totals is not None
        self.observed = self._saved = self.in_step = False
        self.steps += 1
        gradients = self._grads or [None] * len(self.slots)
        for slot, gradient in zip(self.slots, gradients, strict=False):
            # moved without a gradient: no update that could be followed
            self.moves += gradient is None and slot.parameter._version != slot.version
            slot.version, slot.address = slot.parameter._version, slot.local.data_ptr()
        if self.steps <= _GUARDED_STEPS or self._moves_repeat:
            self.guard()
        else:
            self.unguard()
        self._work, self._grads = [], []
        return totals

    def _measure(self, learning_rates: list[Scalar]) -> dict[str, Tensor]:
        if self._unknown and self._marks_tell() and _marks(self._grads) == self._marks:
            self._unknown = False
            if not self.keeps_raw:
                for section in self.sections:
                    section.raw = None
                for bank in self.banks.values():
                    for tile in bank.tiles:
                        tile.forget("raw")
        valid = self._valid()
        for slot, gradient in zip(self.slots, self._grads, strict=True):
            if gradient is not None:
                self._count(slot)
        totals: dict[str, Tensor] = {} if valid is None else {"valid": valid}
        cuts: Cuts = {}
        custom = self._custom()
        for bank, tiles in self._work:
            bank.after.zero_()
            scales: list[Scalar] = [0.0] * bank.columns
            for tile in tiles:
                for part in self._uniform(tile):
                    scales[part.column] = self._finish_or_wait(bank, part, valid, cuts, custom)
            self._commit(bank, scales, learning_rates, valid, totals)
        return totals

    def _count(self, slot: Slot) -> None:
        slot.steps += 1
        section = self._section_of[slot.index]
        if self._response and section.scalar and section.group.get("momentum"):
            slot.response = mobility.next_momentum_response(section.group, slot.response)

    def _custom(self) -> dict[int, tuple[Tensor, Cuts]]:
        """Registered mobilities of this step, spread over each parameter's shape."""
        function = mobility.registered(self.optimizer)
        if function is None:
            return {}
        found: dict[int, tuple[Tensor, Cuts]] = {}
        with torch.no_grad():
            for slot, gradient in zip(self.slots, self._grads, strict=True):
                if gradient is not None:
                    section = self._section_of[slot.index]
                    value = function(self.optimizer, section.group, slot.parameter)
                    if not isinstance(value, Tensor):
                        value = torch.full((), value, dtype=section.dtype, device=section.device)
                    shape = slot.shape if self._processes else slot.parameter.shape
                    spread = local(value).detach().to(section.device, section.dtype).expand(shape)
                    found[slot.index] = spread, {}
        return found

    def _finish_or_wait(
        self, bank: Bank, tile: Tile, valid: Tensor | None, cuts: Cuts, custom: dict[int, tuple[Tensor, Cuts]]
    ) -> Scalar:
        """`_finish_tile`; of a step that is none u is 0, and the update before it stays in `held`."""
        if valid is None:
            return self._finish_tile(bank, tile, valid, cuts, custom)
        held, waiting = tile.own("held"), _kept(bank, tile)
        torch.where(valid, held, tile.parameters(bank.scratch), out=held)
        inverse = self._finish_tile(bank, tile, valid, cuts, custom)
        torch.where(valid, held, waiting, out=held)
        return inverse

    def _finish_tile(
        self, bank: Bank, tile: Tile, valid: Tensor | None, cuts: Cuts, custom: dict[int, tuple[Tensor, Cuts]]
    ) -> Scalar:
        """u into `held`, and the tile's sums; returns 1/numerator of μ (0 where μ is 0 or has no formula)."""
        section, column, at = tile.section, tile.column, bank.after_at
        parameter = tile.parameters(bank.scratch)
        held = tile.own("held")
        moved: Tensor | None = None
        if section.travelled is None:
            torch.sub(parameter, held, out=held)
            dot(held, held, bank.scratch, at[0][column])
        else:
            moved = self._remove_decay(bank, tile, parameter, valid)
        if self.keeps_raw:
            gradient = tile.own("raw")
        else:
            gradient = tile.gather(bank.scratch, "gradient", self._gradients(tile), cuts)
        dot(gradient, held, bank.scratch, at[1][column])
        if section.coupled:
            dot(parameter, held, bank.scratch, at[2][column])
        if section.diagonal:
            return self._finish_mobility(bank, tile, moved, valid, custom)
        return _inverse(self._shared_mobility(section, tile.slots[0])) if section.scalar else 0.0

    def _remove_decay(self, bank: Bank, tile: Tile, parameter: Tensor, valid: Tensor | None) -> Tensor:
        """held ← u + lr w θ_k, 0 where that is rounding; returns where it is not.

        Rounding: less than 2 ulp of θ, whose step may be rounded twice; of half precision, which the optimizer
        rounds once, less than ¾ ulp.
        """
        held, update = tile.own("held"), tile.work(bank.scratch, "update")
        moved = tile.work(bank.scratch, "moved")
        torch.sub(parameter, held, out=update)
        dot(update, update, bank.scratch, bank.after_at[0][tile.column])
        decay = tile.section.group["lr"] * tile.section.decoupled
        if valid is not None:
            decay = decay * valid
        if isinstance(decay, Tensor):
            decayed = held * decay
            update.add_(decayed)
        else:
            decayed, _ = held, update.add_(held, alpha=decay)
        if self.sampled:
            tile.own("travelled").add_(decayed, alpha=1.0 if isinstance(decay, Tensor) else decay)
        precision, own = max(torch.finfo(s.parameter.dtype).eps for s in tile.slots), torch.finfo(held.dtype).eps
        share = 0.25 if precision <= own else 0.67 * own / precision
        torch.add(held, update, alpha=share, out=moved)
        torch.ne(moved, held, out=moved)
        torch.mul(update, moved, out=held)
        dot(held, held, bank.scratch, bank.after_at[3][tile.column])
        if not self.sampled:
            tile.own("travelled").add_(held)
        return moved

    def _finish_mobility(
        self,
        bank: Bank,
        tile: Tile,
        moved: Tensor | None,
        valid: Tensor | None,
        custom: dict[int, tuple[Tensor, Cuts]],
    ) -> Scalar:
        """m += μ where u ≠ 0, and Σ u²·out; returns 1/numerator."""
        section, held = tile.section, tile.own("held")
        assert section.formula is not None
        if tile.high == tile.low:
            return 0.0  # shards of no element: the optimizer may have no state for them
        out = tile.work(bank.scratch, "denominator")
        some = next(slot for slot in tile.slots if slot.numel)
        state = self.optimizer.state.get(some.parameter, {})
        numerator = section.formula.evaluate(section.group, state, stretch(tile, bank.scratch, custom), out)
        if self._clip is not None:
            out.div_(self._clip)
        if isinstance(numerator, Tensor):  # a rate of 0 moves nothing: what it is divided by does not matter
            out.div_(torch.where(numerator == 0, torch.ones_like(numerator), numerator))
            numerator = 1.0
        if moved is None:
            moved = tile.work(bank.scratch, "moved")
            torch.ne(held, 0.0, out=moved)
        if valid is not None:  # a skipped first step leaves a state of zeros: 0/0
            torch.where(valid, out, torch.ones_like(out), out=out)
        tile.own("mobility").addcdiv_(moved, out, value=numerator)
        torch.mul(held, out, out=moved)
        dot(moved, held, bank.scratch, bank.after_at[4][tile.column])
        return _inverse(numerator)

    def _shared_mobility(self, section: Section, slot: Slot) -> Scalar:
        """μ of a parameter whose coordinates share it, before clipping."""
        assert section.formula is not None
        state: dict[str, Any] = {} if slot.response is None else {mobility.RESPONSE: slot.response}
        return section.formula.evaluate(section.group, state, {}, None)

    # -- sums ------------------------------------------------------------------------------------------------

    def _commit(
        self,
        bank: Bank,
        scales: list[Scalar],
        learning_rates: list[Scalar],
        valid: Tensor | None,
        totals: dict[str, Tensor],
    ) -> None:
        """Per-section sums of the step into the running sums; the step's totals for the joint step."""
        known = len(learning_rates)
        rates = bank.vector("rates", [learning_rates[s.index] if s.index < known else 0.0 for s in bank.sections])
        rows = bank.sections_of(bank.after)
        squares, force = rows[0], rows[1]
        if self.keeps_raw:
            force = force if self._scale is None else force / self._scale
        elif self._clip is not None:
            force = force / self._clip
        work = self._work_of(bank, force, None)
        l2_drop, theta = bank.zero, bank.zero
        coupled = self._coupled(bank)
        if coupled is not None:
            theta = rows[2] - squares
            work = work - coupled * theta
            l2_drop = -coupled * (theta + 0.5 * squares)
            theta = rows[2]
        action = _over(squares, rates) if self._per_rate else squares
        work_action = bank.work_action(scales, self._clip)
        met = self._meeting(bank)
        step = torch.stack([squares, action, squares.sqrt(), bank.free(rows), work, *met, l2_drop, work_action])
        if valid is not None:
            step = torch.where(valid, step, torch.zeros_like(step))
        bank.sums.add_(step)
        self._add_shared_mobility(bank, valid)
        last = torch.stack([step[WORK_ITO], rates, theta])
        if valid is not None:
            last = torch.where(valid, last, torch.stack([bank.last_ito, bank.last_rate, bank.last_theta]))
        bank.last_ito, bank.last_rate, bank.last_theta = last.unbind()
        totals["sums"] = _plus(totals.get("sums"), step.sum(1))
        norms = self._norms(bank)
        norms = norms if valid is None else torch.where(valid, norms, torch.zeros_like(norms))
        totals["norms"] = _plus(totals.get("norms"), norms)

    def _work_of(self, bank: Bank, force: Tensor, coupled: Tensor | None) -> Tensor:
        """f·u from g·u: f = −(±g + wθ), the upper sign unless the loss is maximized."""
        if any(s.group.get("maximize", False) for s in bank.sections):
            force = force * bank.vector("s", [-1.0 if s.group.get("maximize", False) else 1.0 for s in bank.sections])
        return -force if coupled is None else -(force + coupled * bank.last_theta)

    def _meeting(self, bank: Bank) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the step before: f_k·u_k, f_{k+1}·u_k, lr_k n_k, lr_k; zeros where nothing was met."""
        if not self._meeting_now:
            return bank.zero, bank.zero, bank.zero, bank.zero
        force = bank.sections_of(bank.before[1])
        if self._scale is not None:
            force = force / self._scale
        anti = self._work_of(bank, force, self._coupled(bank))
        return bank.last_ito, anti, bank.last_rate * (bank.last_ito - anti), bank.last_rate

    def _coupled(self, bank: Bank) -> Tensor | None:
        """w of the L2 term inside the gradient, per section; None where there is none."""
        decays: list[Scalar] = [s.coupled for s in bank.sections]
        return bank.vector("coupled", decays) if any(decays) else None

    def _add_shared_mobility(self, bank: Bank, valid: Tensor | None) -> None:
        if not any(section.scalar for section in bank.sections):
            return
        values: list[Scalar] = []
        for section in bank.sections:
            shared = self._shared_mobility(section, section.slots[0]) if section.scalar else 0.0
            for slot in section.slots:
                value = shared if slot.response is None else self._shared_mobility(section, slot)
                values.append(0.0 if self._grads[slot.index] is None else value)
        step = bank.vector("shared mobility", values)
        if self._clip is not None:
            step = step * self._clip
        bank.slot_mobility.add_(step if valid is None else torch.where(valid, step, torch.zeros_like(step)))

    def _norms(self, bank: Bank) -> Tensor:
        """‖g‖² before and after clipping."""
        squares = bank.before[0]
        raw = bank.sections_of(squares).sum() if self._processes else squares.sum(dtype=bank.member.dtype)
        if self._scale is not None:
            raw = raw / self._scale**2
        return torch.stack([raw, raw if self._clip is None else raw * self._clip**2])

    # -- moves outside of step -------------------------------------------------------------------------------

    def guard(self) -> None:
        """Keep a copy of θ as it is now: a move before the next step can then be measured and taken out."""
        for section in self.sections:
            if all(s.parameter._version == s.version for s in section.slots):  # else the move has begun already
                section.guard = section.snapshot()

    def unguard(self) -> None:
        for section in self.sections:
            section.guard = None

    def check_moves(self) -> None:
        """Compare versions (no sync), and θ with its guarded copy where there is one."""
        for section in self.sections:
            changed = [s for s in section.slots if _touched(s)]
            if section.guard is not None:
                self._take_out(section, bool(changed))
            elif changed:
                self.moves += 1
            for slot in changed:
                slot.version, slot.address = slot.parameter._version, slot.local.data_ptr()

    def _take_out(self, section: Section, noticed: bool) -> None:
        """start ← start + (θ now − θ guarded): the displacement then counts the steps' motion alone."""
        assert section.guard is not None
        squared = torch.zeros((), dtype=sum_dtype(section.device), device=section.device)
        for slot in section.slots:
            low = slot.offset
            for piece in slot.pieces(slot.parameter):
                here = slice(low, low + piece.numel())
                move = piece - section.guard[here]
                section.start[here] += move
                section.guard[here] = piece
                squared += torch.dot(move, move)
                low += piece.numel()
        if noticed:
            self.moves_removed += 1
            self._moves_repeat |= self.steps <= _GUARDED_STEPS
        elif self.steps <= _GUARDED_STEPS:
            self.silent = _plus(self.silent, squared)

    # -- state -----------------------------------------------------------------------------------------------

    def state_dict(self, *, exact: bool) -> dict[str, Any]:
        """Plain types and tensors; `exact`: with m, u_k and what else has the size of the parameters, but θ_0."""
        self._follow_groups()
        state: dict[str, Any] = {
            "optimizer": type(self.optimizer).__name__,
            "steps": self.steps,
            "moves": self.moves,
            "moves_removed": self.moves_removed,
            "silent": None if self.silent is None else float(self.silent),
            "met": self._met and exact and not self._saved,
            "moves_repeat": self._moves_repeat,
            "uneven": None if self.uneven is None else float(self.uneven),
            "sections": [self._section_state(s, exact) for s in self.sections],
            "banks": [
                {
                    "sums": bank.sums.host(),
                    "slot_mobility": bank.slot_mobility.host(),
                    "last": torch.stack([bank.last_ito, bank.last_theta, bank.last_rate]).detach().cpu(),
                }
                for bank in self.banks.values()
            ],
        }
        return state

    def _section_state(self, section: Section, exact: bool) -> dict[str, Any]:
        here = {id(p): i for i, p in enumerate(section.group["params"])}
        gone = [s.index in self._gone for s in section.slots]
        return {
            "group": section.index,
            "layer": section.layer,
            "parameters": [
                _GONE if left else here[id(s.parameter)] for s, left in zip(section.slots, gone, strict=True)
            ],
            "double": section.dtype == torch.float64,
            "positions": [s.position for s in section.slots],
            # Of parameters that have left the optimizer, where they stayed; of a group that has, what it was set to.
            "gone": [
                section.theta(s).detach().cpu().clone() if left and exact else None
                for s, left in zip(section.slots, gone, strict=True)
            ],
            "settings": _plain_settings(section.group) if all(gone) else None,
            "numel": [s.numel for s in section.slots],
            "slots": [[s.steps, s.response] for s in section.slots],
            "effective": section.effective,
            "flat": {
                name: getattr(section, name).detach().cpu().clone()
                for name in _KEPT
                if exact and getattr(section, name) is not None
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Rebuild the sections in their order and take over their sums; `start` is θ now until it is set.

        Raises:
            ValueError: the optimizer's groups do not hold parameters of the sizes that were saved.
        """
        name = type(self.optimizer).__name__
        if state["optimizer"] != name:
            raise ValueError(
                f"the saved measurement is of {state['optimizer']}, got {name}: resume with the same optimizer"
            )
        for entry in state["sections"]:
            self._load_section(entry)
        for bank, entry in zip(self.banks.values(), state["banks"], strict=True):
            bank.sums.load_(entry["sums"])
            bank.slot_mobility.load_(entry["slot_mobility"])
            bank.last_ito, bank.last_theta, bank.last_rate = entry["last"].to(bank.device).unbind()
        self.steps, self.moves, self.moves_removed = state["steps"], state["moves"], state["moves_removed"]
        self._moves_repeat = state["moves_repeat"]
        self._met, self._unknown = state["met"], self._unknown and self.steps == 0
        if state["silent"] is not None:
            self.silent = torch.tensor(state["silent"])
        if state["uneven"] is not None:
            self.uneven = torch.tensor(state["uneven"], dtype=torch.float64)

    def _load_section(self, entry: dict[str, Any]) -> None:
        groups, settings = self.optimizer.param_groups, entry.get("settings")
        held = groups[entry["group"]]["params"] if entry["group"] < len(groups) and settings is None else []
        left = {i: value for i, value in enumerate(entry.get("gone", ())) if entry["parameters"][i] == _GONE}
        home = next((p.device for group in groups for p in group["params"]), torch.device("cpu"))
        parameters = [
            _stand_in(left[i], entry, i, home) if i in left else held[place]
            for i, place in enumerate(entry["parameters"])
            if i in left or place < len(held)
        ]
        sizes = [local(p).numel() * (2 if p.is_complex() else 1) for p in parameters]
        if sizes != entry["numel"]:
            raise ValueError(
                f"the saved measurement is of parameters with {entry['numel']} elements, got {sizes}: "
                "resume with the model and the optimizer that it was saved from"
            )
        section = self.add_section(entry["group"], entry["layer"], parameters, settings)
        self._gone |= {section.slots[i].index for i in left}
        for slot, position in zip(section.slots, entry.get("positions", ()), strict=False):
            slot.position = position
        section.effective = entry["effective"]
        for slot, (steps, response) in zip(section.slots, entry["slots"], strict=True):
            slot.steps, slot.response = steps, response
        for name, value in entry["flat"].items():
            setattr(section, name, value.to(section.device, section.dtype).clone())
        self._bank(section).mark_kinds()

    # -- slots -----------------------------------------------------------------------------------------------

    def _discover(self) -> None:
        """Parameters that have a gradient for the first time: no optimizer has moved them yet, so θ is θ_0."""
        new: dict[tuple[int, str, torch.dtype, torch.device, int], list[Tensor]] = {}
        for index, group in enumerate(self.optimizer.param_groups):
            for parameter in group["params"]:
                empty = parameter.numel() == 0 and not is_flat(parameter)
                if gradient_of(parameter) is None or id(parameter) in self._seen or empty:
                    continue
                layer = self._layer_of(parameter) if self._layer_of else ""
                copies = replication(parameter, self._processes) if self._processes else 1
                key = index, layer, compute_dtype(parameter), parameter.device, copies
                new.setdefault(key, []).append(parameter)
                self._seen[id(parameter)] = None
        for (index, layer, *_), parameters in new.items():
            self.add_section(index, layer, parameters)

    def _follow_groups(self) -> None:
        """`load_state_dict` replaces an optimizer's groups, and parameters may leave it: find each section's again."""
        groups = self.optimizer.param_groups
        members = [[id(p) for p in group["params"]] for group in groups]
        if members == self._members and all(groups[s.index] is s.group for s in self.sections if s.index < len(groups)):
            return
        self._members = members
        owner = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
        self._gone = {slot.index for slot in self.slots if id(slot.parameter) not in owner}
        for section in self.sections:
            index = next((owner[id(s.parameter)] for s in section.slots if s.index not in self._gone), None)
            if index is not None:
                section.index, section.group = index, groups[index]

    def add_section(
        self, group_index: int, layer: str, parameters: list[Tensor], settings: dict[str, Any] | None = None
    ) -> Section:
        """Take in parameters of one group, device and dtype, with θ_0 = θ now; `settings`: of a group that has left."""
        group = self.optimizer.param_groups[group_index] if settings is None else {**settings, "params": []}
        dtype, device = compute_dtype(parameters[0]), parameters[0].device
        bank = self.banks.setdefault((dtype, device), Bank(dtype, device, tile_size(device)))
        share = 1.0 / replication(parameters[0], self._processes) if self._processes else 1.0
        section = Section(self.optimizer, group, layer, dtype, device, index=group_index, share=share)
        places = {id(p): i for i, p in enumerate(group["params"])}
        for parameter in parameters:
            slot = section.add(parameter, len(self.slots), self._place(parameter), bank.size)
            step = self.optimizer.state.get(parameter, {}).get("step", 0)
            slot.steps = int(step) if not isinstance(step, Tensor) or step.device.type == "cpu" else 0
            slot.place = places.get(id(parameter), _GONE)
            slot.first = first_coordinate(parameter) if self._processes else 0
            self.slots.append(slot)
            self._seen[id(parameter)] = slot
            self._section_of.append(section)
        section.allocate()
        if section.decoupled:
            section.travelled = section.zeros()
        if self._response:
            self._start_response(section)
        self.sections.append(section)
        bank.add(section)
        return section

    def _start_response(self, section: Section) -> None:
        """b and B of a fresh optimizer are 0; one that has been running starts at the steady values."""
        group = section.group
        momentum = float(group.get("momentum", 0.0))
        if section.formula is None or not 0.0 < momentum < 1.0:
            return
        running = "momentum_buffer" in self.optimizer.state.get(section.slots[0].parameter, {})
        if section.scalar:
            steady = (1.0 - float(group["dampening"])) / (1.0 - momentum)
            for slot in section.slots:
                slot.response = steady if running else None
            return
        section.response = section.zeros()
        for slot in section.slots if running else ():
            state = self.optimizer.state[slot.parameter]
            average = slot.flat(state["square_avg"])
            if group["centered"]:
                average = average - slot.flat(state["grad_avg"]) ** 2
            steady_response = 1.0 / ((1.0 - momentum) * (average.sqrt() + group["eps"]))
            section.response[slot.offset : slot.offset + slot.numel] = steady_response

    def _bank(self, section: Section) -> Bank:
        return self.banks[section.dtype, section.device]

    def _gradients(self, tile: Tile) -> list[Tensor]:
        return [g for g in (self._grads[s.index] for s in tile.slots) if g is not None]

    def _resolve(self, bank: Bank) -> list[Tile]:
        """Tiles whose slots all have gradients; of others, the parts that have."""
        if all(g is not None for g in self._grads):
            return bank.tiles
        found: list[Tile] = []
        for tile in bank.tiles:
            present = [self._grads[s.index] is not None for s in tile.slots]
            if all(present):
                found.append(tile)
            elif any(present):
                found += [p for p in tile.parts if self._grads[p.slots[0].index] is not None]
        return found

    def _finer(self, tiles: list[Tile]) -> list[Tile]:
        """For the gradients' norms: parameter by parameter where own clipping is to be watched."""
        return [part for tile in tiles for part in (tile.parts or [tile])] if self._watches else tiles

    def _uniform(self, tile: Tile) -> list[Tile]:
        """The tile, or its parts where its slots have taken different numbers of steps (bias corrections differ)."""
        first = tile.slots[0]
        same = all(s.steps == first.steps and s.response == first.response for s in tile.slots)
        return [tile] if same else tile.parts


def _kept(bank: Bank, tile: Tile) -> Tensor:
    """A copy of `held`, until the next tile's."""
    return tile.work(bank.scratch, "kept").copy_(tile.own("held"))


def _unevenness(after: Tensor, before: Tensor) -> Tensor:
    """1 − min/max over the tiles of ‖g_clipped‖²/‖g‖²: 0 where one factor clips all."""
    share = after / before
    some = before > 0
    low = torch.where(some, share, torch.full_like(share, torch.inf)).min()
    high = torch.where(some, share, torch.zeros_like(share)).max()
    return torch.where(high > 0, 1.0 - low / high, torch.zeros_like(high)).to(sum_dtype(after.device))


def _stand_in(theta: Tensor | None, entry: dict[str, Any], index: int, device: torch.device) -> Tensor:
    """For a parameter that had left the optimizer when the measurement was saved: it stays where it was."""
    dtype = torch.float64 if entry["double"] else torch.float32
    return torch.zeros(entry["numel"][index], dtype=dtype, device=device) if theta is None else theta.to(device).clone()


def _plain_settings(group: dict[str, Any]) -> dict[str, Any]:
    """A group's options as numbers and strings."""
    numbers = {k: float(v) if isinstance(v, Tensor) and v.numel() == 1 else v for k, v in group.items()}
    return {k: v for k, v in numbers.items() if isinstance(v, (bool, int, float, str, tuple, type(None)))}


def _touched(slot: Slot) -> bool:
    """Its weights were written to, or replaced by another tensor's, since its last step."""
    return slot.parameter._version != slot.version or slot.local.data_ptr() != slot.address


def _marks(gradients: list[Tensor | None]) -> list[tuple[int, int]]:
    return [(0, 0) if g is None else (id(g), g._version) for g in gradients]


def _plus(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total + term.to(total.device, non_blocking=True)


def _over(squares: Tensor, rates: Tensor) -> Tensor:
    """‖u‖²/lr: 0/0 counts 0 (a warm-up from 0); a motion without learning rate is undefined."""
    undefined = torch.full_like(squares, torch.nan)
    return torch.where(rates > 0, squares / rates, torch.where(squares == 0, torch.zeros_like(squares), undefined))


def _inverse(value: Scalar) -> Scalar:
    """1/x, and 0 for 0: a step without mobility moves nothing, and 0/0 counts 0."""
    if isinstance(value, Tensor):
        return torch.where(value == 0, torch.zeros_like(value), 1.0 / value)
    return 0.0 if value == 0.0 else 1.0 / value
