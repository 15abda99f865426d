"""See the package."""

from atoll.services import nbd as real
from atoll.services.nbd import COUNTERS, plan
from recoverybugs import wrap

__all__ = ["COUNTERS", "main", "plan"]
main = wrap(real)
