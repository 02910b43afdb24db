"""What a comparison comes to, in sentences: what it cost first, and no winner whose interval overlaps."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_speedlimit.record.late import since
from lightning_speedlimit.report.costs import Axis, CostWords
from lightning_speedlimit.report.places import Group
from lightning_speedlimit.report.ranking import below, rivals
from lightning_speedlimit.report.results import Result
from lightning_speedlimit.words import count, interval, listed, number

FEW = 12  # groups of which each is spoken of
MOST_LEFT_OUT = 5  # that are named


def verdict(comparison: Result) -> list[str]:
    """Sentences; each claim of a winner rests on intervals that do not overlap."""
    return [*_begun_late(comparison), *_compared(comparison), *_measured_late(comparison)]


def _begun_late(comparison: Result) -> list[str]:
    """Where all were measured from a later step of their trainings on."""
    begun = since(comparison.groups[0].points[0].run.record.run)
    told = f"All were measured only from step {begun} on: their costs and actions are without what was before."
    return [told] if begun else []


def _measured_late(comparison: Result) -> list[str]:
    if not comparison.late:
        return []
    names = listed(comparison.late, MOST_LEFT_OUT)
    return [f"Left out: {names}, for what came before is in none of their numbers."]


def _compared(comparison: Result) -> list[str]:
    if len(comparison.groups) < 2:
        one = "One run" if len(comparison.groups[0].points) == 1 else "One group"
        return [f"{one}: there is nothing to compare it with."]
    ranking = _ranking(comparison) if comparison.by != "loss" else []
    stretched = any(group.stretched for group in comparison.groups)
    ranking = [*(_drops(comparison) if stretched else []), *ranking]
    if not comparison.at_loss:
        unknown = "The losses are unknown, so that steps and action can't be compared at the same one."
        return ranking if stretched else [*ranking, unknown]
    at = f"At loss {number(comparison.loss_level)}"
    groups = [group for group in comparison.at_loss if group.placed]
    others = [_unknown(group, comparison.axis) for group in comparison.at_loss if group.reached and not group.placed]
    others += _left_out([group for group in comparison.at_loss if not group.reached])
    words = comparison.axis.words
    if len(groups) < 2:
        alone = f"{at}, {groups[0].name} is alone: it took {_amount(groups[0], words)}." if groups else ""
        return [*ranking, alone or f"{at}, there is nothing to compare.", *others]
    few = len(groups) <= FEW
    ranking += [f"{at}, {leaders(groups, words)}.", *_batches(groups, comparison.axis)]
    return [*ranking, _free(groups, at, words, 10 if few else 3), *_losers(groups, words, 8 if few else 0), *others]


def _ranking(comparison: Result) -> list[str]:
    """Who has the lowest loss at the same step or time, and who has none there."""
    ended = [group.name for group in comparison.groups if not group.reached]
    known = rivals(comparison.groups, comparison.by)
    unknown = [group.name for group in comparison.groups if group.reached and group not in known]
    told = [f"{listed(ended)} ended before."] if ended else []
    told += [f"{listed(unknown)} has no finite loss {comparison.where}."] if unknown else []
    if len(known) < 2:
        return [*told, f"No two runs have a loss {comparison.where}."]
    if comparison.winner is not None:
        return [*told, f"{comparison.winner} has the lowest loss {comparison.where}."]
    return [*told, f"No run has clearly the lowest loss {comparison.where}: the intervals overlap."]


def _drops(comparison: Result) -> list[str]:
    """What stretches bought, and what for."""
    words = comparison.axis.words
    drops = [
        f"{g.name} took {_amount(g, words)} for a loss drop of {number(g.values['loss_drop'])}"
        for g in comparison.groups
        if math.isfinite(g.values["loss_drop"])
    ]
    return ["; ".join(drops) + "."] if drops else []


def _amount(group: Group, words: CostWords) -> str:
    """ "230 steps"."""
    return f"{count(group.values['cost'])} {words.heading}"


def _batches(groups: Sequence[Group], axis: Axis) -> list[str]:
    """Why samples are counted, and what counting steps would have said."""
    if axis.sizes is None or not axis.chosen:
        return []
    few, many = (f"{size:.4g}" for size in axis.sizes)
    first, quick = groups[0], min(groups, key=lambda group: group.values["step"])
    told = f"Samples are counted (a step has {few} to {many})"
    if quick is first:
        return [f"{told}; the first in steps is the same."]
    steps = [count(group.values["step"]) for group in (quick, first)]
    return [f"{told}; in steps {quick.name} would be first ({steps[0]}, and {first.name} {steps[1]})."]


def _left_out(groups: Sequence[Group]) -> list[str]:
    """Who did not get to the loss, the nearest first, and how far each came."""
    groups = sorted(groups, key=_lowest)
    near = [group for group in groups if _learned(group)]
    told = [f"{group.name}, never below {number(_lowest(group))}" for group in near[:MOST_LEFT_OUT]]
    if len(near) > len(told):
        told.append(f"{len(near) - len(told)} more, never below {number(_lowest(near[len(told)]))}")
    dead = [group.name for group in groups if not _learned(group)]
    told += [f"{listed(dead, MOST_LEFT_OUT)}, whose loss never clearly fell"] if dead else []
    return [f"Left out: {'; '.join(told)}."] if told else []


def _lowest(group: Group) -> float:
    """The lowest loss of that run of it which came least far; inf of one that is never finite."""
    found = [point.lowest for point in group.points if not point.reached]
    return max(math.inf if math.isnan(lowest) else lowest for lowest in found)


def _learned(group: Group) -> bool:
    return math.isfinite(_lowest(group)) and all(point.fell for point in group.points if not point.reached)


def _unknown(group: Group, axis: Axis) -> str:
    """Why a group has no place in the plane."""
    cost = not math.isfinite(group.values["cost"])
    reasons = [point.run.record.reasons.get(axis.key if cost else "action") for point in group.points]
    why = next((f": {reason}" for reason in reasons if reason), "")
    what = "action" if not cost else "elapsed time" if axis.key == "elapsed" else axis.name
    return f"The {what} of {group.name} {'are' if what == axis.name else 'is'} unknown{why}."


def leaders(groups: Sequence[Group], words: CostWords, *, intervals: bool = True) -> str:
    """Who needed the least of the cost and who the least action, as far as that can be told; of two groups or more."""
    told: list[str] = []
    leaders: list[str] = []
    for key, least, unit, noun in (
        ("cost", words.least, f" {words.heading}", words.noun),
        ("action", "least action", "", "action"),
    ):
        first, *others = sorted(groups, key=lambda group: group.values[key])
        bounds = getattr(first, f"{key}_interval")
        near = [other.name for other in others if not below(bounds, getattr(other, f"{key}_interval"))]
        value = count(first.values[key]) + (unit if intervals else "")
        if intervals and interval(bounds) != count(first.values[key]):
            value += f", {interval(bounds)}"
        if near:
            told.append(f"no clear winner on {noun}: {first.name} ({value}) overlaps with {listed(near, 3)}")
        else:
            same = leaders == [first.name]
            leaders.append(first.name)
            told.append(f"the {least} ({value})" if same else f"{first.name} needed the {least} ({value})")
    joint = " and " if told[1].startswith("the ") else "; "
    return f"{told[0]}{joint}{told[1]}"


def _free(groups: Sequence[Group], at: str, words: CostWords, most: int) -> str:
    """Who is on the frontier, of the means."""
    names = [group.name for group in groups if group.beaten_by is None]
    means = " in the mean" if any(len(group.points) > 1 for group in groups) else ""
    if len(names) == 1:
        return f"{at}, no other took {words.less} or less action than {names[0]}{means}."
    neither = "neither is better on both" if len(names) == 2 else "none of these is better on both"
    return f"{at}, {listed(names, most)} are beaten by none in {words.noun} and action{means}: {neither}."


def _losers(groups: Sequence[Group], words: CostWords, most: int) -> list[str]:
    """Beaten clearly, and those of which that can't be told."""
    by_name = {group.name: group for group in groups}
    sentences, unclear = [], []
    for group in groups:
        if group.beaten_by is None:
            continue
        other = by_name[group.beaten_by]
        if group.clearly:
            cost, action = (_times(group, other, *what) for what in (("cost", words.noun), ("action", "action")))
            sentences.append(f"{group.name} is beaten by {other.name}: {cost}, {action}.")
        else:
            unclear.append(f"{group.name} (behind {other.name})")
    if len(sentences) > most:
        kept = sentences[: max(most - 1, 0)]
        sentences = [*kept, f"{len(sentences) - len(kept)} {'more ' if kept else ''}are beaten clearly."]
    return sentences + ([f"Behind, but not clearly: {listed(unclear, 6 if most else 3)}."] if unclear else [])


def _times(group: Group, other: Group, key: str, word: str) -> str:
    """ "2.0 times the steps"; "40.0 steps against 0" where the other was there at its start."""
    value, least = group.values[key], other.values[key]
    return f"{number(value / least, 2)} times the {word}" if least else f"{number(value)} {word} against 0"
