"""Systems whose entropy production is known by another route: equations solved, or quadrature."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg import expm, solve_continuous_lyapunov
from torch import Tensor, nn

Array = npt.NDArray[np.float64]


# --- quadratic potential, Langevin dynamics (theory page, §5)


@dataclass(frozen=True)
class Quadratic:
    """L = ½ Σ h_i x_i² at temperature T, started from N(m_0, s_0²) in each mode."""

    curvature: Tensor
    mean: Tensor
    deviation: Tensor
    temperature: float

    def module(self) -> nn.Module:
        return QuadraticPotential(self)

    def moments(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """m(t) and v(t), (times, modes)."""
        h, t = self.curvature, t[:, None]
        spread = -torch.expm1(-2 * h * t) / h
        return torch.exp(-h * t) * self.mean, torch.exp(-2 * h * t) * self.deviation**2 + self.temperature * spread

    def wasserstein2_squared(self, t: Tensor) -> Tensor:
        mean, variance = self.moments(t)
        return ((mean - self.mean) ** 2 + (variance.sqrt() - self.deviation) ** 2).sum(1)

    def free_energy_drop(self, time: float) -> float:
        """∫ Σ h²m² + (h − T/v)²v dt, by Gauss–Legendre."""
        nodes, weights = np.polynomial.legendre.leggauss(60)
        t = torch.from_numpy((nodes + 1) / 2 * time)
        mean, variance = self.moments(t)
        h = self.curvature
        rate = ((h * mean) ** 2 + (h - self.temperature / variance) ** 2 * variance).sum(1)
        return float(rate @ torch.from_numpy(weights)) / 2 * time

    def loss_drop(self, time: float) -> float:
        mean, variance = self.moments(torch.tensor([0.0, time], dtype=torch.float64))
        loss = 0.5 * (self.curvature * (mean**2 + variance)).sum(1)
        return float(loss[0] - loss[1])


class QuadraticPotential(nn.Module):
    def __init__(self, case: Quadratic) -> None:
        super().__init__()
        self.x = nn.Parameter(case.mean + case.deviation * torch.randn_like(case.mean))
        self.register_buffer("curvature", case.curvature)

    def forward(self) -> Tensor:
        return 0.5 * (self.curvature * self.x**2).sum()


# --- linear drift, dx = −Ax dt + √(2D) dW, sampled exactly


@dataclass(frozen=True)
class Linear:
    """Solved by Lyapunov's equation AC + CAᵀ = 2D; ν = (DC⁻¹ − A)x in the steady state."""

    drift: Array
    diffusion: Array

    @property
    def covariance(self) -> Array:
        found: Array = solve_continuous_lyapunov(self.drift, 2 * self.diffusion)
        return found

    @property
    def rate(self) -> float:
        """σ = tr(Mᵀ D⁻¹ M C), M = DC⁻¹ − A."""
        return self.rate_of(np.zeros(len(self.drift)), self.covariance)

    def rate_of(self, mean: Array, covariance: Array) -> float:
        """σ of any Gaussian law: ν = −Am + (DC⁻¹ − A)(x − m)."""
        slope = self.diffusion @ np.linalg.inv(covariance) - self.drift
        steady = self.drift @ mean
        inverse = np.linalg.inv(self.diffusion)
        return float(steady @ inverse @ steady + np.trace(slope.T @ inverse @ slope @ covariance))

    def moved(self, mean: Array, covariance: Array, time: float) -> tuple[Array, Array]:
        propagator, steady = expm(-self.drift * time), self.covariance
        return propagator @ mean, propagator @ (covariance - steady) @ propagator.T + steady

    def sample(
        self,
        lag: float,
        records: int,
        replicas: int,
        seed: int,
        start: tuple[Array, Array] | None = None,
    ) -> tuple[Array, Array]:
        """Times (K,) and positions (K, R, d): the exact law at any lag; from the steady state unless told."""
        d = len(self.drift)
        random = np.random.default_rng(seed)
        mean, cov = (np.zeros(d), self.covariance) if start is None else start
        propagator, steady = expm(-self.drift * lag), self.covariance
        noise = np.linalg.cholesky(steady - propagator @ steady @ propagator.T)
        x = np.empty((records, replicas, d))
        x[0] = mean + random.standard_normal((replicas, d)) @ np.linalg.cholesky(cov).T
        kicks = random.standard_normal((records - 1, replicas, d)) @ noise.T
        for k in range(records - 1):
            x[k + 1] = x[k] @ propagator.T + kicks[k]
        return lag * np.arange(records), x


def cramer_rao(system: Linear, lag: float, samples: int) -> float:
    """The least standard error of σ from so many pairs, drift and diffusion unknown: √(∇σ·I⁻¹∇σ).

    Fisher's information of y ~ N(Gx, N) in steps of a parameter: tr(N⁻¹ G' C G'ᵀ) + ½ tr(N⁻¹N'N⁻¹N').
    """
    d, step = len(system.drift), 1e-5
    unit = np.eye(d)

    def at(change: Array, noise: Array) -> tuple[Array, Array, float]:
        moved = Linear(system.drift + change, system.diffusion + noise)
        propagator, cov = expm(-moved.drift * lag), moved.covariance
        return propagator, cov - propagator @ cov @ propagator.T, moved.rate

    ways = [(np.outer(a, b), 0 * unit) for a in unit for b in unit]
    ways += [(0 * unit, np.outer(a, b) + np.outer(b, a)) for i, a in enumerate(unit) for b in unit[i:]]
    slopes = []
    for way in ways:
        ahead, behind = at(*(step * w for w in way)), at(*(-step * w for w in way))
        slopes.append([(x - y) / (2 * step) for x, y in zip(ahead, behind, strict=True)])
    propagators, noises, rates = (np.array([s[i] for s in slopes]) for i in range(3))
    inverse = np.linalg.inv(at(0 * unit, 0 * unit)[1])
    information = np.einsum("iab,jab->ij", inverse @ propagators @ system.covariance, propagators)
    turned = inverse @ noises
    information += 0.5 * np.einsum("iab,jba->ij", turned, turned)
    return float(np.sqrt(rates @ np.linalg.solve(information, rates) / samples))


def chain(beads: int) -> Linear:
    """Beads between two walls, springs and friction 1, temperatures linear from T_h = 1 to T_c = 0.1.

    Source: Otsubo, Ito, Dechant, Sagawa 2020, Phys. Rev. E 101, 062106; the rate depends on T_c/T_h alone.
    """
    springs = 2 * np.eye(beads) - np.eye(beads, k=1) - np.eye(beads, k=-1)
    return Linear(springs, np.diag(np.linspace(1.0, 0.1, beads)))


CHAIN_RATES = {2: 2.025, 3: 1.157, 5: 0.630, 10: 0.308}


def rotating(turns: list[float], pulls: list[float], temperature: float) -> Linear:
    """Planes that turn at ω and are pulled in by h, mixed by a rotation: σ = Σ 2ω²/h, no gradient flow."""
    d = 2 * len(turns)
    drift = np.zeros((d, d))
    for i, (turn, pull) in enumerate(zip(turns, pulls, strict=True)):
        drift[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = [[pull, -turn], [turn, pull]]
    mixed = np.linalg.qr(np.random.default_rng(0).standard_normal((d, d)))[0] if d > 2 else np.eye(d)
    return Linear(mixed @ drift @ mixed.T, temperature * np.eye(d))


# --- quartic potentials


def euler(
    force: Callable[[Array], Array],
    temperature: float,
    start: Array,
    *,
    step: float,
    lag: float,
    records: int,
    seed: int,
) -> tuple[Array, Array]:
    """Times (K,) and positions (K, R, d) of dx = f dt + √(2T) dW, recorded once per lag."""
    random = np.random.default_rng(seed)
    per_lag, x, found = round(lag / step), start.copy(), [start.copy()]
    for _ in range(records - 1):
        for _ in range(per_lag):
            x = x + step * force(x) + np.sqrt(2 * temperature * step) * random.standard_normal(x.shape)
        found.append(x.copy())
    return lag * np.arange(records), np.stack(found)


@dataclass(frozen=True)
class Whirl:
    """In the plane, −∇(|x|⁴/4) and a force ω|x|² along the circles: ν is that force, p ∝ e^{−|x|⁴/4T} all the same."""

    temperature: float
    turn: float

    def force(self, x: Array) -> Array:
        squared = (x**2).sum(1, keepdims=True)
        return squared * (self.turn * np.stack([-x[:, 1], x[:, 0]], 1) - x)

    @property
    def rate(self) -> float:
        """σ = ω²⟨|x|⁶⟩/T, by quadrature over the radius."""
        r = np.linspace(0, 6, 20001)
        weight = r * np.exp(-(r**4) / 4 / self.temperature)
        return float(self.turn**2 * (r**6 * weight).sum() / weight.sum() / self.temperature)

    def start(self, replicas: int, seed: int) -> Array:
        """Exactly from p: |x|⁴/4T is a Gamma variable of shape ½."""
        random = np.random.default_rng(seed)
        radius = (4 * self.temperature * random.gamma(0.5, size=replicas)) ** 0.25
        angle = 2 * np.pi * random.random(replicas)
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


@dataclass(frozen=True)
class HeavyTails:
    """In the plane, p ∝ (1 + |x|²)^{−3}, whose sixth moment is infinite, and a force ω along the circles/(1 + |x|²)."""

    temperature: float
    turn: float

    def force(self, x: Array) -> Array:
        around = self.turn * np.stack([-x[:, 1], x[:, 0]], 1)
        return (around - 6 * self.temperature * x) / (1 + (x**2).sum(1, keepdims=True))

    @property
    def rate(self) -> float:
        """σ = ω²⟨|x|²/(1 + |x|²)²⟩/T = ω²/6T: with s = 1/(1 + |x|²), p is 2s ds and the mean that of s(1 − s)."""
        nodes, weights = np.polynomial.legendre.leggauss(3)
        s = (nodes + 1) / 2
        return float(weights / 2 @ (2 * s * s * (1 - s)) * self.turn**2 / self.temperature)

    def start(self, replicas: int, seed: int) -> Array:
        """Exactly from p: 1/(1 + |x|²) is the root of a uniform variable."""
        random = np.random.default_rng(seed)
        radius = np.sqrt(random.random(replicas) ** -0.5 - 1)
        angle = 2 * np.pi * random.random(replicas)
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


@dataclass(frozen=True)
class QuarticRelaxation:
    """L = x⁴/4 in one dimension, from N(m, s²): the Fokker–Planck equation on a grid is the truth."""

    temperature: float
    mean: float
    deviation: float

    @staticmethod
    def force(x: Array) -> Array:
        return -(x**3)

    def rates(self, times: Array) -> Array:
        """σ(t) = ∫ ν²p/T dx, ν = −x³ − T ∂ log p, (times,)."""
        grid = np.linspace(-4, 4, 601)
        width = grid[1] - grid[0]
        # Fluxes between cells that vanish for e^{−L/T} (Scharfetter & Gummel 1969).
        slope = np.diff(grid**4 / 4) / self.temperature
        up, down = (self.temperature / width**2 * _bernoulli(sign * slope) for sign in (1, -1))
        generator = np.diag(up, -1) + np.diag(down, 1)
        generator -= np.diag(generator.sum(0))
        p = np.exp(-((grid - self.mean) ** 2) / 2 / self.deviation**2)
        p /= p.sum() * width
        found, step = [], expm(generator * (times[1] - times[0]))
        p = expm(generator * times[0]) @ p
        for _ in times:
            flux = (up * p[:-1] - down * p[1:]) * width
            between = (p[:-1] + p[1:]) / 2
            inside = between > 1e-12 * p.max()
            found.append(float((flux[inside] ** 2 / between[inside]).sum() * width / self.temperature))
            p = step @ p
        return np.array(found)


def _bernoulli(z: Array) -> Array:
    """z/(e^z − 1), which is 1 at 0."""
    small = np.abs(z) < 1e-8
    return np.where(small, 1 - z / 2, z / np.where(small, 1.0, np.expm1(z)))
