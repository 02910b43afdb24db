"""Gradients that change between backward and step: by clipping, or because the optimizer is to be given others."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_cases import EXACT, KINEMATIC, WORKS, Copies, Writer, assert_effective, assert_right
from torch import Tensor, nn
from torch.optim import SGD, Adam

from lightning_speedlimit.trajectory import TrajectoryMeter

RATE = 0.05
# Norms of the gradients: some above the 1.0 of clipping and some below, or all above.
MIXED = (2.0, 0.3, 1.5, 4.0, 0.2, 0.9, 3.0, 0.45)
ABOVE = (2.0, 1.3, 1.5, 4.0, 1.2, 1.9, 3.0, 1.45)
Change = Callable[[list[Tensor], int], list[Tensor]]


def norm(gradients: list[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients]).norm()


def projected(gradients: list[Tensor], step: int) -> list[Tensor]:
    """PCGrad: what lies along another task's gradient is taken out, and that gradient is added."""
    generator = torch.Generator().manual_seed(step)
    other = [torch.randn(g.shape, generator=generator, dtype=g.dtype) for g in gradients]
    share = sum((g * o).sum() for g, o in zip(gradients, other, strict=True)) / norm(other) ** 2
    return [g + (0.5 - share) * o for g, o in zip(gradients, other, strict=True)]


CHANGES: dict[str, Change] = {
    "by norm": lambda gradients, k: [g * (1.0 / norm(gradients)).clamp(max=1.0) for g in gradients],
    "by value": lambda gradients, k: [g.clamp(-0.1, 0.1) for g in gradients],
    "by module": lambda gradients, k: [g * (0.1 * (i + 1) / g.norm()) for i, g in enumerate(gradients)],
    "quartered": lambda gradients, k: [g / 4 for g in gradients],
    # by one factor at a time, which is neither a clipping one nor the same at all steps
    "scattered": lambda gradients, k: [g / (2 + k % 3) for g in gradients],
    "projected": projected,
    "none": lambda gradients, k: gradients,
}
WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "in place": lambda p, value: p.grad.copy_(value),
    "through data": lambda p, value: p.grad.data.copy_(value),
    "replaced": lambda p, value: setattr(p, "grad", value.clone()),
}


class Walk:
    """Random gradients of the given norms, observed and changed before each step."""

    def __init__(
        self,
        change: str,
        norms: tuple[float, ...] = ABOVE,
        write: Callable[[Tensor, Tensor], Any] = WRITES["in place"],
        kind: Any = SGD,
        dtype: torch.dtype = torch.float64,
        **meter: Any,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.parameters = [nn.Parameter(torch.ones(s, dtype=dtype)) for s in ((4, 3), (5,))]
        optimizer = kind(self.parameters, lr=RATE)
        self.meter = TrajectoryMeter(optimizer, loss_window=2, **meter)
        self.raw, self.given = Copies(self.parameters), Copies(self.parameters)
        for k, size in enumerate(norms):
            gradients = [0.5 + torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in self.parameters]
            scale = size / norm(gradients)
            for p, g in zip(self.parameters, gradients, strict=True):
                p.grad = (scale * g).to(dtype)
            self.meter.record_loss(torch.tensor(2.0 - 0.1 * k, dtype=torch.float64))
            self.meter.observe_gradients(optimizer)
            raw = self.raw.gradient()
            changed = CHANGES[change]([p.grad.clone() for p in self.parameters], k)
            for p, g in zip(self.parameters, changed, strict=True):
                write(p, g)
            self.raw.step(lambda: self.given.step(optimizer.step), raw=lambda raw=raw: raw)


def assert_clipped(run: Walk, rel: float = EXACT) -> None:
    """The force is the observed gradient, and SGD's mobility c lr."""
    values = assert_right(run.meter, run.raw, rel=rel)
    factors = [float(g.norm() / r.norm()) for g, r in zip(run.given.raw, run.raw.raw, strict=True)]
    spent = math.fsum(float(u @ u) / (RATE * c) for u, c in zip(run.raw.updates, factors, strict=True))
    assert values["work_action"] == pytest.approx(spent, rel=rel)
    assert abs(values["work_ito"] / run.given.values()["work_ito"] - 1) > 0.1, "the given gradients would be others"


def assert_given(run: Walk, rel: float = EXACT) -> None:
    """The force is what the optimizer was given, so SGD's mobility is its rate and Σ u²/lr its work."""
    values = assert_right(run.meter, run.given, rel=rel)
    assert values["work_action"] == pytest.approx(run.given.values()["work_ito"], rel=rel)
    assert values["efficiency_action"] == pytest.approx(run.given.values()["kinematic_efficiency"], rel=rel)
    assert abs(values["work_ito"] / run.raw.values()["work_ito"] - 1) > 0.01, "the raw gradients would be others"


SETTINGS: dict[str, dict[str, Any]] = {"clipping": {}} | {s: {"gradient_changes": s} for s in ("given", "unknown")}
settings = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
norms = pytest.mark.parametrize("sizes", [ABOVE, MIXED], ids=["always", "sometimes"])
# float32: u = θ_{k+1} − θ_k of θ near 1 and u near 0.01 is known to 6e-8/0.01 each, at random signs.
dtypes = pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, EXACT), (torch.float32, 1e-5)], ids=["64", "32"])


@norms
@dtypes
@pytest.mark.parametrize("setting", ["clipping", "unknown"])
def test_clipping_by_norm(sizes: tuple[float, ...], dtype: torch.dtype, rel: float, setting: str) -> None:
    """Declared, or told from the one norm of what was clipped."""
    assert_clipped(Walk("by norm", sizes, dtype=dtype, **SETTINGS[setting]), rel)


@pytest.mark.parametrize("change", ["quartered", "scattered"])
def test_what_is_declared_as_clipping_is_clipping(change: str) -> None:
    assert_clipped(Walk(change))


@pytest.mark.parametrize("kind", [SGD, Adam])
@pytest.mark.parametrize("change", ["by value", "by module"])
def test_clipping_by_more_than_one_factor(change: str, kind: type) -> None:
    run = Walk(change, kind=kind)
    values = assert_right(run.meter, run.raw)
    assert_effective(values, run.raw)
    # the losses are a straight line
    assert values["conversion"] == pytest.approx(0.1 * len(ABOVE) / run.raw.values()["work_ito"], rel=EXACT)


@pytest.mark.parametrize("change", ["quartered", "scattered", "projected", "by value", "by norm"])
def test_what_is_declared_as_given_is_the_force(change: str) -> None:
    assert_given(Walk(change, gradient_changes="given"))


@dtypes
@pytest.mark.parametrize("change", ["quartered", "projected", "by value"])
def test_what_is_told_from_the_numbers_to_be_given(change: str, dtype: torch.dtype, rel: float) -> None:
    assert_given(Walk(change, dtype=dtype, gradient_changes="unknown"), rel)


def test_what_cannot_be_told_is_undefined_and_says_so() -> None:
    run = Walk("scattered", gradient_changes="unknown")
    values = assert_right(run.meter, run.raw, KINEMATIC)
    efficiencies = ("efficiency", "efficiency_low", "efficiency_drift", "efficiency_action")
    for name in (*WORKS, "work_action", "conversion", *efficiencies):
        assert math.isnan(values[name]), name
        assert "gradient" in run.meter.reasons[name], name


@settings
def test_gradients_that_did_not_change(setting: dict[str, str]) -> None:
    run = Walk("none", MIXED, **setting)
    values = assert_right(run.meter, run.raw)
    assert values["work_action"] == pytest.approx(run.raw.values()["work_ito"], rel=EXACT)


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(ValueError, match="gradient_changes"):
        Walk("by norm", gradient_changes="scaled")


@pytest.mark.parametrize("kind", [SGD, Adam])
@pytest.mark.parametrize("change", ["by norm", "by value", "quartered", "projected"])
@pytest.mark.parametrize("write", ["through data", "replaced"])
@settings
def test_how_a_gradient_is_changed_makes_no_difference(
    setting: dict[str, str], write: str, change: str, kind: type
) -> None:
    """In place, in place without a trace, or by another tensor: bitwise the same numbers and the same reasons."""
    first, second = (Walk(change, MIXED, WRITES[how], kind, **setting).meter for how in ("in place", write))
    # as hexadecimal numbers, so that NaN equals NaN
    found = [{name: float(v).hex() for name, v in meter.compute().items()} for meter in (first, second)]
    assert found[1] == found[0]
    assert second.reasons == first.reasons


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_change_before_clipping_is_seen_where_the_gradient_gets_other_memory(elsewhere: bool) -> None:
    """Clipping writes once. A quarter of the gradient before it is a change by others, which numbers can't tell."""
    p = nn.Parameter(torch.ones(5))
    optimizer = SGD([p], lr=RATE)
    meter = TrajectoryMeter(optimizer)
    meter.recorder.expect_writes(1)
    for k in range(4):
        p.grad = torch.arange(1.0, 6.0) * (k + 1)
        meter.observe_gradients()
        if elsewhere:
            p.grad.data = p.grad.data / 4
        else:
            p.grad /= 4
        nn.utils.clip_grad_norm_([p], 0.5)
        optimizer.step()
    assert math.isnan(meter.compute()["work_ito"])
    assert "part of the loss can't be told" in meter.reasons["work_ito"]
    meter.close()


def hooked(change: Callable[[Tensor], Any], first: bool, observes: bool = False) -> Any:
    """A run whose gradients a hook changes just before the step; `first`: registered before the meter's."""
    p = nn.Parameter(torch.ones(6, dtype=torch.float64))
    optimizer, copies = SGD([p], lr=RATE), Copies([p])

    def hook(*step: Any) -> None:
        change(p)

    if first:
        optimizer.register_step_pre_hook(hook)
    meter = TrajectoryMeter(optimizer)
    if not first:
        optimizer.register_step_pre_hook(hook)
    for k in range(5):
        p.grad = torch.arange(1.0, 7.0, dtype=torch.float64) * (k + 1)
        if observes:
            meter.observe_gradients()
        copies.step(optimizer.step, raw=copies.gradient)
    meter.close()
    return meter, copies


HOOKS: dict[str, Callable[[Tensor], Any]] = {
    "quartered": lambda p: p.grad.div_(4),
    "replaced": lambda p: setattr(p, "grad", p.grad / 4),
    "clipped": lambda p: nn.utils.clip_grad_norm_([p], 0.1),
}


@pytest.mark.parametrize("change", HOOKS.values(), ids=HOOKS)
def test_a_hook_before_the_meters_gives_the_gradient(change: Callable[[Tensor], Any]) -> None:
    assert_right(*hooked(change, first=True))


@pytest.mark.parametrize("observes", [False, True])
@pytest.mark.parametrize("change", HOOKS.values(), ids=HOOKS)
def test_a_hook_after_the_meters_leaves_no_work(change: Callable[[Tensor], Any], observes: bool) -> None:
    """The step may have changed the gradients itself: what the hook did can't be told from it."""
    meter, copies = hooked(change, first=False, observes=observes)
    values = assert_right(meter, copies, KINEMATIC)
    for name in (*WORKS, "work_action", "efficiency_action"):
        assert math.isnan(values[name]), name
        assert "register" in meter.reasons[name], name
    resumed = TrajectoryMeter(meter.optimizers)
    resumed.load_state_dict(meter.state_dict())
    assert math.isnan(resumed.compute()["work_ito"])
    resumed.close()


@pytest.mark.parametrize("first", [False, True])
def test_a_hook_that_only_looks_is_no_change(first: bool) -> None:
    assert_right(*hooked(lambda p: p.grad.norm(), first=first))


def test_other_meters_change_nothing() -> None:
    """Even of an optimizer that writes into its gradients."""
    p = nn.Parameter(torch.ones(6, dtype=torch.float64))
    optimizer, copies = Writer([p], lambda p: p.grad.mul_(2)), Copies([p])
    meters = [TrajectoryMeter(optimizer) for _ in range(3)]
    for k in range(5):
        p.grad = torch.arange(1.0, 7.0, dtype=torch.float64) * (k + 1)
        copies.step(optimizer.step)
    for meter in meters:
        assert_right(meter, copies)
        meter.close()


@pytest.mark.parametrize("others", [False, True])
def test_clipping_of_gradients_in_one_bucket(others: bool) -> None:
    """As DistributedDataParallel keeps them: what is written to one view counts as written to each."""
    parameters = [nn.Parameter(torch.ones(n, dtype=torch.float64)) for n in (4, 3, 5)]
    bucket = torch.zeros(12, dtype=torch.float64)
    optimizer, copies = SGD(parameters, lr=RATE), Copies(parameters)
    meter = TrajectoryMeter(optimizer)
    meter.recorder.expect_writes(1)
    for p, view in zip(parameters, bucket.split([4, 3, 5]), strict=True):
        p.grad = view
    for k in range(5):
        bucket.copy_(torch.arange(1.0, 13.0) * (k + 1))
        meter.observe_gradients()
        raw = copies.gradient()
        if others:
            parameters[1].grad.mul_(0.5)  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_(parameters, 0.5)
        copies.step(optimizer.step, raw=lambda raw=raw: raw)
    if others:
        assert math.isnan(meter.compute()["work_ito"])
    else:
        assert_right(meter, copies)
    meter.close()
