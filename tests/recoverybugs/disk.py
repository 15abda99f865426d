"""See the package."""

from atoll.drivers import disk as real
from atoll.drivers.disk import COUNTERS, plan
from recoverybugs import wrap

__all__ = ["COUNTERS", "main", "plan"]
main = wrap(real)
