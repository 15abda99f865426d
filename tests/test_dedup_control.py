"""Control calls of dedup that look: where blocks lie."""

import struct
from typing import Any

import pytest
from nbdclient import Connection
from serverkit import Server

from atoll.kernel.client import Client, Refused

BLOCK = 4096


def place(server: Server, volume: str, **fields: Any) -> tuple[int, ...]:
    with Client(server.data) as client:
        answer = client.call("call", role="dedup", message={"call": "map", "name": volume, **fields})["answer"]
    assert answer["fast"] == bytes(fields["count"]), "there is no fast tier"
    return struct.unpack(f"<{fields['count']}Q", answer["values"])


def test_the_map_says_where_blocks_lie(module_server: Server) -> None:
    module_server.cli("volume", "create", "map", "16MiB")
    with Connection.open(str(module_server.socket)) as connection:
        connection.negotiate("map")
        connection.write(8 * BLOCK, b"".join(bytes([number]) * BLOCK for number in (1, 2, 3, 1)))
        connection.flush()
    values = place(module_server, "map", first=7, count=6)
    assert [value >> 60 for value in values] == [0, 1, 1, 1, 1, 0], "hole, four places, hole"
    first, second, third, again = (value & (1 << 60) - 1 for value in values[1:5])
    assert again == first and len({first, second, third}) == 3
    assert (second, third) == (first + 1, first + 2), "written in sequence"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"name": "nosuch", "first": 0, "count": 1}, "no volume 'nosuch'"),
        ({"name": "disk", "first": -1, "count": 1}, "first is -1"),
        ({"name": "disk", "first": 1 << 40, "count": 1}, f"first is {1 << 40}"),
        ({"name": "disk", "first": "0", "count": 1}, "first is '0'"),
        ({"name": "disk", "first": 0, "count": 8193}, "count is 8193: at most 8192"),
        ({"name": "disk", "first": (1 << 30) // BLOCK - 2, "count": 3}, "count is 3: at most 2"),
        ({"name": "disk", "first": 0, "count": 0}, "count"),
        ({"name": "disk", "first": 0}, "count"),
    ],
)
def test_a_map_that_cannot_be_is_refused(module_server: Server, fields: dict[str, Any], text: str) -> None:
    with Client(module_server.data) as client, pytest.raises(Refused, match=text):
        client.call("call", role="dedup", message={"call": "map", **fields})
