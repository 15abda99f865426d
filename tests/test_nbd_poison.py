"""A request that crashes nbd by itself, on the whole server: tried twice, then refused; nobody else feels it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from nbd_poison import POISON
from nbdclient import Connection
from serverkit import Server


def test_poison_costs_its_own_connection_only(
    make_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    server = make_server(config={"testing": {"modules": {"nbd": "nbd_poison"}}}).start()
    with Connection.open(str(server.socket)) as bystander, Connection.open(str(server.socket)) as culprit:
        bystander.negotiate("disk")
        bystander.write(0, b"innocent" * 512)
        culprit.greet()
        culprit.send_option(99, POISON)
        cookies = [bystander.submit(0, 0, 4096) for _ in range(20)]
        assert culprit.is_closed_by_server()
        assert all(bystander.wait(cookie).check().data == b"innocent" * 512 for cookie in cookies)
        assert server.row("nbd")["restarts"] == 2
        assert server.json("status")["counters"]["nbd"]["poisoned"] == 1
        with Connection.open(str(server.socket)) as another:
            another.greet()
            assert another.list_exports() == ["disk"]
        assert bystander.read(0, 8) == b"innocent"
        assert server.row("nbd")["restarts"] == 2
