"""The driver of the fast device, which cannot start while a file named `broken` lies beside its device."""

from pathlib import Path
from typing import Any

from atoll.drivers import disk
from atoll.drivers.disk import COUNTERS, plan

__all__ = ["COUNTERS", "main", "plan"]


def main(context: Any) -> None:
    if (Path(context.config["fast_device"]).parent / "broken").exists():
        context.fail("told to be broken")
    disk.main(context)
