"""The nbd service with a bug (testing.modules): one option makes the process abort."""

import os
from typing import Any

from atoll.services import nbd
from atoll.services.nbd import COUNTERS, negotiation, plan

__all__ = ["COUNTERS", "main", "plan"]
POISON = b"poison"


def main(context: Any) -> None:
    judge = negotiation.option

    def option(state: negotiation.State, header: bytes, data: bytes, volumes: Any) -> negotiation.Answer:
        if data == POISON:
            os.abort()
        return judge(state, header, data, volumes)

    negotiation.option = option
    nbd.main(context)
