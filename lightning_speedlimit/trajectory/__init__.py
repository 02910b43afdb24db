"""Measure what an optimizer does to its parameters, step by step. torch alone; no Lightning."""

from lightning_speedlimit.trajectory.meter import TrajectoryMeter
from lightning_speedlimit.trajectory.mobility import register_mobility

__all__ = ["TrajectoryMeter", "register_mobility"]
