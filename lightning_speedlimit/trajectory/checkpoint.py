"""What a measurement needs to go on: plain types and tensors, of the size of the measured coordinates."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from lightning_speedlimit.trajectory.coordinates import Coordinates
from lightning_speedlimit.trajectory.follower import Follower
from lightning_speedlimit.trajectory.gathering import UNIT, dense
from lightning_speedlimit.trajectory.motion import Motion
from lightning_speedlimit.trajectory.reading import Reader
from lightning_speedlimit.trajectory.recorder import Recorder
from lightning_speedlimit.trajectory.runs import Member
from lightning_speedlimit.trajectory.sums import Pair, on

_CHANGES = ("steps", "by_others", "late")


KEYS = ("joint", "losses", "followers", "stepwise", "coordinates", "failure")


def state_of(recorder: Recorder, reader: Reader) -> dict[str, Any]:
    return {
        "joint": recorder.joint.state_dict(),
        "losses": recorder.losses.state_dict(),
        "followers": [_follower_state(f) for f in recorder.followers],
        "stepwise": reader.stepwise.state_dict(),
        "coordinates": reader.coordinates,
        "failure": recorder.failure,
    }


def load(recorder: Recorder, reader: Reader, state: dict[str, Any]) -> list[Motion]:
    """Go on from a state; returns the motions that it had.

    Raises:
        ValueError: the state is of other optimizers or parameters.
    """
    followers = recorder.followers
    if len(state["followers"]) != len(followers):
        raise ValueError(f"the saved measurement is of {len(state['followers'])} optimizers, got {len(followers)}")
    recorder.joint.layers[:] = state["joint"]["layers"]  # the motions take their places among them
    try:
        for follower, entry in zip(followers, state["followers"], strict=True):
            _load_motions(follower, entry)
    except Exception:  # nothing is left of a state that is refused
        recorder.joint.layers.clear()
        for follower in followers:
            follower.motions.clear()
        raise
    for follower, entry in zip(followers, state["followers"], strict=True):
        _load_follower(follower, entry)
    motions = [motion for follower in followers for motion in follower.motions]
    device = _device(motions)
    recorder.joint.load_state_dict(state["joint"], device)
    recorder.losses.load_state_dict(state["losses"], device)
    reader.stepwise.load_state_dict(state["stepwise"])
    reader.coordinates = state["coordinates"]
    recorder.failure = state["failure"]
    return motions


def _device(motions: list[Motion]) -> torch.device:
    return motions[0].coordinates.device if motions else torch.device("cpu")


def _follower_state(follower: Follower) -> dict[str, Any]:
    norms, changes = follower.norms(), follower.changes
    follower.membership.follow()  # who has left the optimizer since its last step
    return {
        "optimizer": type(follower.optimizer).__name__,
        "motions": [_motion_state(motion) for motion in follower.motions],
        "took_part": follower.took_part,
        "norms": on("cpu", norms),
        "changes": {"stats": on("cpu", changes.stats)} | {name: getattr(changes, name) for name in _CHANGES},
        "unforced": on("cpu", follower.unforced),
    }


def _load_motions(follower: Follower, state: dict[str, Any]) -> None:
    """Rebuild the motions and take over their sums.

    Raises:
        ValueError: the state is of another optimizer, or its groups do not hold parameters of the saved sizes.
    """
    name = type(follower.optimizer).__name__
    if state["optimizer"] != name:
        raise ValueError(
            f"the saved measurement is of {state['optimizer']}, got {name}: resume with the same optimizer"
        )
    for entry in state["motions"]:
        _load_motion(follower, entry)


def _load_follower(follower: Follower, state: dict[str, Any]) -> None:
    """All but the motions."""
    device, changes = _device(follower.motions), state["changes"]
    follower.restore(on(device, state["norms"]))
    follower.took_part, follower.unforced = state["took_part"], on(device, state["unforced"])
    follower.changes.stats = on(device, changes["stats"])
    for name in _CHANGES:
        setattr(follower.changes, name, changes[name])


def _motion_state(motion: Motion) -> dict[str, Any]:
    coordinates, optimizer, overlap = motion.coordinates, motion.optimizer, motion.overlap
    known = {id(p): i for group in optimizer.param_groups for i, p in enumerate(group["params"])}
    places = [known.get(id(p)) for p in coordinates.parameters]
    pairs = {"m": motion.mobility.m, "travelled": motion.decay.travelled}
    return {
        "members": [{**asdict(m), "options": _plain(m.options)} for m in motion.members],
        "places": places,  # in the groups; None: it has left the optimizer
        "left": {i: coordinates.scatter(motion.theta.rows, i).cpu() for i, at in enumerate(places) if at is None},
        "sizes": [shape.numel() for shape in coordinates.shapes],
        "drawn": [on("cpu", d) for d in coordinates.drawn],
        "weights": [on("cpu", w) for w in coordinates.inverse],
        "shares": list(coordinates.shares),
        "vectors": {name: on("cpu", vector) for name, vector in _vectors(motion).items()},
        "gradient": on("cpu", _last_gradient(motion)),
        "overlaps": overlap is not None and bool(overlap.known),
        "origin": on("cpu", motion.moves.origin),
        "averages": on("cpu", motion.mobility.averages),
        "pairs": {n: (on("cpu", p.high), on("cpu", p.low), p.count) for n, p in pairs.items() if p is not None},
        "sums": {name: total.host() for name, total in motion.sums.known.items()},
        "moves": motion.moves.sums.host(),
        "waiting": motion.waiting,
    }


def _load_motion(follower: Follower, entry: dict[str, Any]) -> None:
    members = [Member(**member) for member in entry["members"]]
    parameters = _parameters(follower, members, entry)
    for size, units in zip(entry["sizes"], entry["drawn"], strict=True):
        if units is not None and len(units) and not 0 <= int(units.min()) <= int(units.max()) < size // UNIT:
            raise ValueError(
                f"the saved measurement is damaged: of a parameter of {size} coordinates it has drawn units from "
                f"{int(units.min())} to {int(units.max())}, and there are {size // UNIT}"
            )
    coordinates = Coordinates(parameters, entry["drawn"], entry["weights"], entry["shares"])
    motion = follower.membership.take_in(coordinates, members)
    for name, vector in _vectors(motion).items():
        vector.copy_(entry["vectors"][name])
    if entry["gradient"] is not None:
        motion.gradient.rows.copy_(entry["gradient"])
        motion.closed = True
    if motion.overlap is not None:
        motion.overlap.restore(known=entry["overlaps"])
    motion.moves.origin = on(coordinates.device, entry["origin"])
    motion.mobility.averages = on(coordinates.device, entry["averages"])
    motion.mobility.m, motion.decay.travelled = (_pair(motion, entry["pairs"].get(n)) for n in ("m", "travelled"))
    for name, value in entry["sums"].items():
        motion.sums.load(name, value)
    motion.moves.sums.load_(entry["moves"])
    motion.waiting = entry["waiting"]


def _vectors(motion: Motion) -> dict[str, Tensor]:
    own = {name: getattr(motion, name) for name in ("start", "update", "last", "squares")}
    return own | {"theta": motion.theta.rows}


def _last_gradient(motion: Motion) -> Tensor | None:
    """−f of the last step, for its norm's error and for the next one's overlap with it."""
    if motion.overlap is None:
        return None if motion.coordinates.exact else motion.gradient.rows
    return (motion.gradient if motion.closed else motion.overlap.before).rows


def _pair(motion: Motion, saved: tuple[Tensor, Tensor, int] | None) -> Pair | None:
    if saved is None:
        return None
    pair = Pair(motion.start)
    pair.high.copy_(saved[0])
    pair.low.copy_(saved[1])
    pair.count = saved[2]
    return pair


def _parameters(follower: Follower, members: list[Member], entry: dict[str, Any]) -> list[Tensor]:
    """Those of the groups; for one that has left, a stand-in that stays where it was."""
    groups, found = follower.optimizer.param_groups, list[Tensor]()
    home = next((p.device for group in groups for p in group["params"]), torch.device("cpu"))
    for i, (member, place) in enumerate(zip(members, entry["places"], strict=True)):
        held = groups[member.group]["params"] if member.group < len(groups) else []
        if place is None:
            found.append(entry["left"][i].to(home))
        elif place < len(held):
            found.append(held[place])
    got = [dense(p).numel() for p in found]
    if got != entry["sizes"]:
        raise ValueError(
            f"the saved measurement is of parameters with {entry['sizes']} elements, got {got}: "
            "resume with the model and the optimizer that it was saved from"
        )
    return found


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """A group's options as numbers and strings."""
    numbers = {k: float(v) if isinstance(v, Tensor) and v.numel() == 1 else v for k, v in options.items()}
    return {k: v for k, v in numbers.items() if isinstance(v, (bool, int, float, str, tuple, type(None)))}
