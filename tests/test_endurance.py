"""Endurance, compressed; an hour of it: make endurance (endurance.py)."""

import random
from collections.abc import Callable

import pytest
from endurance import CONFIG, Endurance
from serverkit import Server


@pytest.mark.slow
def test_endurance(make_server: Callable[..., Server]) -> None:
    server = make_server(config={**CONFIG, "device_size": "192MiB"}).start()
    Endurance(server, random.randrange(1 << 32)).run(8)
