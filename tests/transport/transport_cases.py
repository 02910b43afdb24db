"""Pairs of clouds, at random from a seed, and by construction."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Draw:
    """Random numbers from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = generator(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * torch.rand(1, generator=self.generator, dtype=torch.float64).item()

    def integer(self, low: int, high: int) -> int:
        """low ≤ k ≤ high"""
        return int(torch.randint(low, high + 1, (1,), generator=self.generator))

    def one_of(self, *values: object) -> object:
        return values[self.integer(0, len(values) - 1)]

    def order(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator)

    def rotation(self, d: int) -> Tensor:
        return torch.linalg.qr(self.normal(d, d)).Q


# ---- at random -----------------------------------------------------------------------------------------


def independent(draw: Draw, n: int, d: int) -> tuple[Tensor, Tensor]:
    return draw.normal(n, d), draw.normal(n, d)


def lazy(draw: Draw, n: int, d: int) -> tuple[Tensor, Tensor]:
    """Every particle moves by r of its norm, r from 1e-7, the spacing of float32, to 0.1."""
    x = draw.normal(n, d)
    return x, x + 10 ** draw.uniform(-7, -1) * draw.normal(n, d)


def permuted(draw: Draw, n: int, d: int) -> tuple[Tensor, Tensor]:
    x = draw.normal(n, d)
    return x, x[draw.order(n)]


def lazy_and_permuted(draw: Draw, n: int, d: int) -> tuple[Tensor, Tensor]:
    x, y = lazy(draw, n, d)
    return x, y[draw.order(n)]


def rotated(draw: Draw, n: int, d: int) -> tuple[Tensor, Tensor]:
    x = draw.normal(n, d)
    return x, x @ draw.rotation(d)


def features(draw: Draw, n: int, d: int) -> tuple[Tensor, Tensor]:
    """A low-rank nonlinear motion as large as the particles, and noise: neurons that learn features."""
    x = draw.normal(n, d)
    read, move = draw.normal(d, 3) / d**0.5, draw.normal(d, 3)
    return x, x + torch.tanh(3 * x @ read) @ move.T + 0.3 * draw.normal(n, d)


def clustered(draw: Draw, n: int, d: int) -> tuple[Tensor, Tensor]:
    """Both in the same few clusters, 1e-4 as wide as they are apart."""
    centres = draw.normal(4, d)
    label = torch.arange(n) % 4
    return centres[label] + 1e-4 * draw.normal(n, d), centres[label] + 1e-4 * draw.normal(n, d)


KINDS: tuple[Callable[[Draw, int, int], tuple[Tensor, Tensor]], ...] = (
    independent,
    lazy,
    permuted,
    lazy_and_permuted,
    rotated,
    features,
    clustered,
)


def random_pair(seed: int, *, largest: int = 400) -> tuple[Tensor, Tensor]:
    """x, y (N, D) of any kind and scale; some far from the origin, some with duplicates, in either precision."""
    draw = Draw(seed)
    n, d = round(math.exp(draw.uniform(0, math.log(largest)))), draw.one_of(1, 2, 3, 10, 64, 300)
    assert isinstance(d, int)
    x, y = KINDS[seed % len(KINDS)](draw, n, d)
    if draw.integer(0, 3) == 0:
        again = torch.arange(n) % -(-n // 2)  # every particle twice, its partners apart or together
        x, y = x[again], y[again] if draw.integer(0, 1) else y
    if draw.integer(0, 3) == 0:
        offset = 1e4 * draw.normal(d)
        x, y = x + offset, y + offset
    scale = 10 ** draw.uniform(-12, 12)
    dtype = draw.one_of(torch.float32, torch.float64)
    assert isinstance(dtype, torch.dtype)
    return (scale * x).to(dtype), (scale * y).to(dtype)


def circle(n: int, *, turn: int) -> tuple[Tensor, Tensor]:
    """n points on the unit circle, and the same turned by `turn` places: the same set."""
    angle = torch.arange(n, dtype=torch.float64) * (2 * math.pi / n)
    x = torch.stack([angle.cos(), angle.sin()], 1)
    return x, x.roll(-turn, 0)


# ---- i → i is optimal: y is the gradient of a convex function at x ---------------------------------------


def positive_definite_map(draw: Draw, n: int, d: int) -> tuple[Tensor, Tensor]:
    """y = A x, A symmetric with eigenvalues from 0.1 to 10: the gradient of ½⟨x, A x⟩."""
    x = draw.normal(n, d)
    turn = draw.rotation(d)
    return x, x @ (turn * 10 ** (2 * torch.rand(d, generator=draw.generator).double() - 1)) @ turn.T


def softplus_ridges(draw: Draw, n: int, d: int) -> tuple[Tensor, Tensor]:
    """y = x + Σ_k a_k σ(⟨u_k, x⟩ + b_k) u_k, a_k ≥ 0: the gradient of ½|x|² + Σ a_k softplus."""
    x, directions, offsets = draw.normal(n, d), 2 * draw.normal(5, d), draw.normal(5)
    return x, x + torch.sigmoid(x @ directions.T + offsets) @ (draw.normal(5).abs()[:, None] * directions)


def nearest_vertex(draw: Draw, n: int, d: int) -> tuple[Tensor, Tensor]:
    """y = the vertex a_k of the largest ⟨a_k, x⟩ + b_k: the gradient of that maximum; many particles share a y."""
    x, vertices, offsets = draw.normal(n, d), draw.normal(7, d), draw.normal(7)
    return x, vertices[(x @ vertices.T + offsets).argmax(1)]


def monotone_per_coordinate(draw: Draw, n: int, d: int) -> tuple[Tensor, Tensor]:
    """y_k = exp(3 x_k) + c_k, far from linear: the gradient of Σ exp(3 x_k)/3 + c_k x_k."""
    x = draw.normal(n, d)
    return x, (3 * x).exp() + 10 * draw.normal(d)


def small_displacements(draw: Draw, n: int, d: int) -> tuple[Tensor, Tensor]:
    """2|d_i| ≤ min_j |x_i − x_j| in any direction: both balls of a pair keep their particles apart."""
    x = draw.normal(n, d)
    gaps = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(math.inf).min(1).values
    step = draw.normal(n, d)
    length = torch.rand(n, 1, generator=draw.generator).double() * gaps[:, None].clamp(max=1) / 2
    return x, x + step / step.norm(dim=1, keepdim=True) * length


MONOTONE = (positive_definite_map, softplus_ridges, nearest_vertex, monotone_per_coordinate, small_displacements)
