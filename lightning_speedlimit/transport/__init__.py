"""W₂ between clouds of weights, with a certificate: lower ≤ W₂² ≤ upper."""

from lightning_speedlimit.transport.gaussian import gaussian_wasserstein2_squared
from lightning_speedlimit.transport.wasserstein2 import Transport, wasserstein2_squared

__all__ = ["Transport", "gaussian_wasserstein2_squared", "wasserstein2_squared"]
