"""See the package."""

from atoll.drivers import nic as real
from atoll.drivers.nic import COUNTERS, plan
from recoverybugs import wrap

__all__ = ["COUNTERS", "main", "plan"]
main = wrap(real)
