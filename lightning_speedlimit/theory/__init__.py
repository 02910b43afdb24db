"""Closed forms of the thermodynamic speed limit: what an exact run would show.

Sources: Seroussi, Alemi, Helias, Ringel, "Speed Limits for Deep Learning", arXiv:2307.14653; Jacot, Gabriel,
Hongler, "Neural Tangent Kernel", arXiv:1806.07572.
"""

from lightning_speedlimit.theory.curve import Curve
from lightning_speedlimit.theory.diffusion import langevin
from lightning_speedlimit.theory.flow import InitialShare, gradient_flow, split_initial
from lightning_speedlimit.theory.linear import linear_regression, perceptron
from lightning_speedlimit.theory.spectra import power_law, power_law_exponent
from lightning_speedlimit.theory.tangent import empirical_ntk, ntk_eigenbasis, predict

__all__ = [
    "Curve",
    "InitialShare",
    "empirical_ntk",
    "gradient_flow",
    "langevin",
    "linear_regression",
    "ntk_eigenbasis",
    "perceptron",
    "power_law",
    "power_law_exponent",
    "predict",
    "split_initial",
]
