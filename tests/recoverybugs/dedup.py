"""See the package."""

from atoll.services import dedup as real
from atoll.services.dedup import COUNTERS, plan
from recoverybugs import wrap

__all__ = ["COUNTERS", "main", "plan"]
main = wrap(real)
