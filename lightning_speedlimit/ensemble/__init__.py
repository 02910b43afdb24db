"""Replicas of a run: how far their distribution came from its speed limit, and the entropy that they produce."""

from lightning_speedlimit.ensemble.entropy import gaussian_entropy, neighbour_entropy
from lightning_speedlimit.ensemble.estimate import Estimate
from lightning_speedlimit.ensemble.limit import DistributionLimit, speed_limit
from lightning_speedlimit.ensemble.linear import entropy_production_linear
from lightning_speedlimit.ensemble.replicas import Replicas, train_replicas
from lightning_speedlimit.ensemble.uncertainty import (
    RateBound,
    entropy_production_bound,
    entropy_production_polynomial,
)

__all__ = [
    "DistributionLimit",
    "Estimate",
    "RateBound",
    "Replicas",
    "entropy_production_bound",
    "entropy_production_linear",
    "entropy_production_polynomial",
    "gaussian_entropy",
    "neighbour_entropy",
    "speed_limit",
    "train_replicas",
]
