"""Runs whose numbers are known in closed form, and a reader of HTML, for the tests of the page."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

import numpy as np

from lightning_speedlimit import RunRecord, compare
from lightning_speedlimit.record import SKETCH_SIZE
from lightning_speedlimit.report import Comparison

HOSTILE = "<script>alert('a')</script> & \"b\""
LEVEL = 0.5  # the loss at which the cases are compared


@dataclass(frozen=True)
class Zigzag:
    """Steps of v ahead and w to the side and back: D = v k at even k, ℓ = √(v² + w²) k, A = (v² + w²) k.

    The loss is e^{−k/time}, the conversion constant.
    """

    time: float
    ahead: float
    aside: float
    conversion: float = 0.4
    steps: int = 120
    every: int = 4
    rate: float = 0.1
    error: float = 0.01
    """Of the loss."""

    @property
    def straightness(self) -> float:
        return self.ahead**2 / (self.ahead**2 + self.aside**2)

    def crossing(self, level: float) -> float:
        """The step at which the loss comes down to the level: linear between log steps."""
        steps = np.arange(0, self.steps + 1, self.every)
        return float(np.interp(-level, -np.exp(-steps / self.time), steps))

    def action(self, step: float) -> float:
        return (self.ahead**2 + self.aside**2) * step

    def record(self, direction: int = 0, **run: Any) -> RunRecord:
        """In the plane of coordinates `direction` and `direction` + 1 of the sketch."""
        described = {
            "clock": "steps",
            "entropy_production": "loss_drop",
            "parameters": 10,
            "optimizers": [{"class": "SGD", "groups": [{"lr": self.rate, "momentum": 0, "foreach": None}]}],
            "batch_size": 8,
            "versions": {"torch": "2.9", "pytorch_lightning": "2.6"},
        }
        record = RunRecord(described | run)
        for k in range(self.every, self.steps + 1, self.every):
            record.append(k, self._row(k))
            sketch = np.zeros(SKETCH_SIZE)
            sketch[direction : direction + 2] = self.ahead * k, self.aside * (k % 2)
            record.add_sketch(k, sketch)
        return record

    def _row(self, k: int) -> dict[str, float]:
        squared, drop = self.ahead**2 + self.aside**2, 1 - math.exp(-k / self.time)
        work = drop / self.conversion
        return {
            "elapsed": k,
            "seconds": 0.01 * k,
            "displacement": self.ahead * k,
            "path_length": squared**0.5 * k,
            "action": squared * k,
            "loss": 1 - drop,
            "loss_se": self.error,
            "loss_drop": drop,
            "loss_drop_se": self.error,
            "entropy_production": drop,
            "work_ito": work,
            "work_anti_ito": 0.3 * work,
            "work_stratonovich": 0.65 * work,
            "work_action": work,
            "straightness": self.straightness,
            "steadiness": 1.0,
            "kinematic_efficiency": self.straightness,
            "conversion": self.conversion,
            "signal_fraction": 0.3,
            "efficiency": self.straightness / self.conversion,
            "efficiency_low": 0.5 * self.straightness / self.conversion,
            "efficiency_drift": 0.8 * self.straightness / self.conversion,
            "efficiency_action": self.straightness,
        }


# On the frontier: the hostile one is fast and dear, the seeds slow and cheap; "slow" is beaten; "short" does not come.
FAST = Zigzag(time=20, ahead=0.3, aside=0.5, rate=0.5)
SEEDS = (Zigzag(time=40, ahead=0.1, aside=0.05), Zigzag(time=44, ahead=0.11, aside=0.05))
SLOW = Zigzag(time=80, ahead=0.15, aside=0.4, conversion=0.2, rate=0.01)
SHORT = Zigzag(time=100, ahead=0.1, aside=0.1, steps=40)


def comparison(**given: Any) -> Comparison:
    """Four groups at the loss ½, of which one did not get there."""
    return compare(
        {
            HOSTILE: FAST.record(0, model=HOSTILE),
            "seeds": [case.record(2 * place) for place, case in enumerate(SEEDS)],
            "slow": SLOW.record(1),
            "short": SHORT.record(3),
        },
        **({"by": "loss", "at": LEVEL} | given),
    )


@dataclass
class Element:
    """An element of a page, with what is in it."""

    tag: str
    attributes: dict[str, str | None]
    children: list["Element"] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    """Of its own and of all within, in order."""

    def __getitem__(self, name: str) -> str:
        return self.attributes.get(name) or ""

    def __iter__(self) -> Iterator["Element"]:
        """Itself and all within."""
        yield self
        for child in self.children:
            yield from child

    def all(self, *tags: str) -> list["Element"]:
        return [element for element in self if element.tag in tags]

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())


class Reader(HTMLParser):
    """Reads a page as a tree; an end tag that does not belong to the innermost open element is an error."""

    VOID = ("meta", "link", "br", "img", "input", "hr")

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("document", {})
        self._open = [self.root]
        self.feed(page)
        self.close()
        assert self._open == [self.root], f"not closed: {[element.tag for element in self._open[1:]]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs))
        assert len(element.attributes) == len(attrs), f"an attribute twice in <{tag}>: {attrs}"
        self._open[-1].children.append(element)
        if tag not in self.VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open[-1].children.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1].tag == tag, f"</{tag}> closes <{self._open[-1].tag}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.texts.append(data)


def read(page: str) -> Element:
    """The page as a tree."""
    return Reader(page).root
