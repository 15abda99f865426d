"""Domains that look around before they sleep (`kernel.spin_us`): whatever comes meanwhile is seen."""

from __future__ import annotations

from collections.abc import Callable

from nbdclient import Connection
from serverkit import Server

ROUNDS = 300


def test_a_client_that_comes_while_nic_spins(make_server: Callable[..., Server]) -> None:
    """Just after a request nic spins; that somebody connects is told once only. It has no other reason to wake up."""
    server = make_server(config={"kernel": {"spin_us": 1000}, "volumes": [{"name": "disk", "size": "16MiB"}]}).start()
    with Connection.open(str(server.socket), timeout_s=20) as busy:
        busy.negotiate("disk")
        for _ in range(ROUNDS):
            assert busy.read(0, 4096) == bytes(4096)
            with Connection.open(str(server.socket), timeout_s=20) as guest:
                guest.greet()
