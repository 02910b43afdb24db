"""What a measurement needs to go on: plain types and tensors, of the size of the measured coordinates."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from lightning_speedlimit.trajectory.coordinates import Coordinates
from lightning_speedlimit.trajectory.follower import Follower
from lightning_speedlimit.trajectory.gathering import dense
from lightning_speedlimit.trajectory.motion import Motion
from lightning_speedlimit.trajectory.reading import Reader
from lightning_speedlimit.trajectory.recorder import Recorder
from lightning_speedlimit.trajectory.runs import Member
from lightning_speedlimit.trajectory.sums import SUMS, Pair

_GONE = -1  # the place of a parameter that has left the optimizer
_VECTORS = ("start", "update", "last", "squares")


def state_of(recorder: Recorder, reader: Reader) -> dict[str, Any]:
    return {
        "joint": recorder.joint.state_dict(),
        "losses": recorder.losses.state_dict(),
        "followers": [_follower_state(f) for f in recorder.followers],
        "stepwise": reader.stepwise.state_dict(),
        "coordinates": reader.coordinates,
        "failure": recorder.failure,
    }


def load(recorder: Recorder, reader: Reader, state: dict[str, Any]) -> None:
    """Raises ValueError where the state is of other optimizers or parameters, or of sampled steps with other sums."""
    _check_sums(state)
    followers = recorder.followers
    if len(state["followers"]) != len(followers):
        raise ValueError(f"the saved measurement is of {len(state['followers'])} optimizers, got {len(followers)}")
    recorder.joint.layers[:] = state["joint"]["layers"]  # the motions take their places among them
    for follower, entry in zip(followers, state["followers"], strict=True):
        _load_follower(follower, entry)
    motions = [motion for follower in followers for motion in follower.motions]
    device = motions[0].coordinates.device if motions else torch.device("cpu")
    recorder.joint.load_state_dict(state["joint"], device)
    recorder.losses.load_state_dict(state["losses"], device)
    reader.stepwise.load_state_dict(state["stepwise"])
    reader.coordinates = state["coordinates"]
    recorder.failure = state["failure"]


def _check_sums(state: dict[str, Any]) -> None:
    """A former version had one sum more. It is left out, but not where each sampled step has a row of them."""
    samples = state["joint"]["samples"]
    for row in (*state["stepwise"]["last"], *(() if samples is None else samples)):
        if len(row) != len(SUMS):
            raise ValueError(
                f"the saved measurement is of sampled steps with {len(row)} sums each, got a version with {len(SUMS)}: "
                "resume with the version that it was saved by, or measure anew"
            )


def _follower_state(follower: Follower) -> dict[str, Any]:
    norms = follower.norms()
    follower.membership.follow()  # who has left the optimizer since its last step
    return {
        "optimizer": type(follower.optimizer).__name__,
        "motions": [_motion_state(motion) for motion in follower.motions],
        "took_part": follower.took_part,
        "norms": None if norms is None else norms.cpu(),
        "changes": follower.changes.state_dict(),
        "unforced": None if follower.unforced is None else float(follower.unforced),
    }


def _motion_state(motion: Motion) -> dict[str, Any]:
    coordinates = motion.coordinates
    places = {id(p): i for group in motion.optimizer.param_groups for i, p in enumerate(group["params"])}
    members = list(zip(motion.members, coordinates.parameters, strict=True))
    pairs = {"m": motion.mobility.m, "travelled": motion.decay.travelled}
    return {
        "members": [{**asdict(m), "options": _plain(m.options)} for m, _ in members],
        "places": [_GONE if m.gone else places[id(p)] for m, p in members],
        "left": {i: coordinates.scatter(motion.theta.rows, i).cpu() for i, (m, _) in enumerate(members) if m.gone},
        "shapes": [list(shape) for shape in coordinates.shapes],
        "drawn": [None if d is None else d.cpu() for d in coordinates.drawn],
        "weights": [w if w is None else w.cpu() for w in coordinates.inverse],
        "shares": list(coordinates.shares),
        "after": motion.theta.rows.cpu().clone(),
        "vectors": {name: getattr(motion, name).cpu().clone() for name in _VECTORS},
        "gradient": _last_gradient(motion),
        "origin": None if motion.moves.origin is None else motion.moves.origin.cpu().clone(),
        "averages": None if motion.mobility.averages is None else motion.mobility.averages.cpu().clone(),
        "pairs": {n: (p.high.cpu().clone(), p.low.cpu().clone(), p.count) for n, p in pairs.items() if p is not None},
        "sums": {name: total.host() for name, total in motion.sums.known.items()},
        "moves": motion.moves.sums.host(),
        "waiting": motion.waiting,
        "held": (coordinates.held, coordinates.judged, coordinates.known),
    }


def _last_gradient(motion: Motion) -> dict[str, Any] | None:
    """−f of the last step, for its norm's error and for the next one's overlap with it."""
    overlap = motion.overlap
    if overlap is None:
        return None if motion.coordinates.exact else {"rows": motion.gradient.rows.cpu().clone(), "known": True}
    last = motion.gradient if motion.closed else overlap.before
    return {"rows": last.rows.cpu().clone(), "known": bool(overlap.known)}


def _load_follower(follower: Follower, state: dict[str, Any]) -> None:
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
    norms = state["norms"]
    device = follower.motions[0].coordinates.device if follower.motions else torch.device("cpu")
    follower.restore(None if norms is None else norms.to(device))
    follower.took_part = state["took_part"]
    follower.changes.load_state_dict(state["changes"], device)
    if state["unforced"] is not None:
        follower.unforced = torch.tensor(state["unforced"], dtype=torch.float64).to(device)


def _load_motion(follower: Follower, entry: dict[str, Any]) -> None:
    members = [Member(**member) for member in entry["members"]]
    parameters = _parameters(follower, members, entry)
    coordinates = Coordinates(parameters, entry["drawn"], entry["weights"], entry["shares"])
    motion = follower.membership.take_in(coordinates, members)
    motion.theta.rows.copy_(entry["after"])
    for name in _VECTORS:
        getattr(motion, name).copy_(entry["vectors"][name])
    if entry["gradient"] is not None:
        motion.gradient.rows.copy_(entry["gradient"]["rows"])
        motion.closed = True
        if motion.overlap is not None:
            motion.overlap.restore(known=entry["gradient"]["known"])
    origin, averages = (
        None if saved is None else saved.to(coordinates.device, copy=True)
        for saved in (entry["origin"], entry["averages"])
    )
    motion.moves.origin, motion.mobility.averages = origin, averages
    motion.mobility.m, motion.decay.travelled = (_pair(motion, entry["pairs"].get(n)) for n in ("m", "travelled"))
    for name, value in entry["sums"].items():
        if name in SUMS:  # a former version had one more
            motion.sums.load(name, value)
    motion.moves.sums.load_(entry["moves"])
    motion.waiting = entry["waiting"]
    held, coordinates.judged, coordinates.known = entry.get("held", (False, 0, 0))
    coordinates.held = held and coordinates.on_host and coordinates.exact


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
        if place == _GONE:
            found.append(entry["left"][i].to(home))
        elif place < len(held):
            found.append(held[place])
    wanted = [torch.Size(shape).numel() for shape in entry["shapes"]]
    got = [dense(p).numel() for p in found]
    if got != wanted:
        raise ValueError(
            f"the saved measurement is of parameters with {wanted} elements, got {got}: "
            "resume with the model and the optimizer that it was saved from"
        )
    return found


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """A group's options as numbers and strings."""
    numbers = {k: float(v) if isinstance(v, Tensor) and v.numel() == 1 else v for k, v in options.items()}
    return {k: v for k, v in numbers.items() if isinstance(v, (bool, int, float, str, tuple, type(None)))}
