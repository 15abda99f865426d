"""Bad input over real sockets against the whole server: each ends in a clear error, and nobody else is disturbed.

A bystander is connected all the time; after each test it must find its data as it left them, and the connections of the
test must be gone from nbd's table and from the slots.
"""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Iterator

import pytest
from nbdclient import (
    BadReply,
    Command,
    CommandFlag,
    Connection,
    Dropped,
    ErrorCode,
    Info,
    NbdError,
    Option,
    Rep,
    Request,
    TransmissionFlag,
    info_data,
    meta_data,
    parse_infos,
    request_bytes,
)
from serverkit import Server, wait_for

from atoll.kernel.client import Client

MIB = 1 << 20
SIZE = 64 * MIB
SEED = 20240229
NIC = {"handshake_timeout_s": 2, "payload_timeout_s": 2, "reply_timeout_s": 3, "max_connections": 200}
MODES = {"simple": {"structured": False}, "structured": {}, "extended": {"extended": True}}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(
        tmp_path_factory.mktemp("w"),
        config={
            "nic": NIC,
            "volumes": [{"name": "disk", "size": SIZE}, {"name": "fixed", "size": MIB, "read_only": True}],
        },
    )
    try:
        yield server.start()
    finally:
        left = server.end()
        assert not left, "left behind:\n" + "\n".join(left)


@pytest.fixture(scope="module")
def bystander(running: Server) -> Iterator[tuple[Connection, bytes]]:
    with Connection.open(str(running.socket)) as connection:
        connection.negotiate("disk")
        data = random.Random(SEED).randbytes(MIB)
        connection.write(SIZE - MIB, data)
        yield connection, data


@pytest.fixture(params=["unix", "tcp"])
def address(running: Server, request: pytest.FixtureRequest) -> str | tuple[str, int]:
    if request.param == "unix":
        return str(running.socket)
    host, port = running.uri("disk", "tcp").removeprefix("nbd://").split("/")[0].rsplit(":", 1)
    return host, int(port)


@pytest.fixture(autouse=True)
def undisturbed(running: Server, bystander: tuple[Connection, bytes]) -> Iterator[None]:
    restarts = running.row("nbd")["restarts"], running.row("nic")["restarts"]
    yield
    connection, data = bystander
    assert connection.read(SIZE - MIB, MIB) == data
    assert (running.row("nbd")["restarts"], running.row("nic")["restarts"]) == restarts, "something crashed"
    wait_for("the connections of the test are gone", lambda: only_the_bystander_is_left(running))


def only_the_bystander_is_left(server: Server) -> bool:
    probe = counters(server, "nbd")
    return probe["connections_opened"] - probe["connections_closed"] == 1


def counters(server: Server, role: str) -> dict[str, int]:
    with Client(server.data) as client:
        return dict(client.call("status")["counters"][role])


def connect(address: str | tuple[str, int], export: str = "disk", **mode: bool) -> Connection:
    connection = Connection.open(address)
    connection.negotiate(export, **mode)
    return connection


# --- The handshake ---


def test_whole_handshake(address: str | tuple[str, int]) -> None:
    with Connection.open(address) as connection:
        assert connection.greet() == 3
        assert connection.list_exports() == ["disk", "fixed"]
        assert connection.option(Option.STRUCTURED_REPLY)[-1].type == Rep.ACK
        assert connection.meta_context(Option.LIST_META_CONTEXT, "disk", []) == [(0, "base:allocation")]
        assert connection.meta_context(Option.SET_META_CONTEXT, "disk") == [(1, "base:allocation")]
        info = parse_infos(connection.option(Option.INFO, info_data(b"disk", list(Info))))
        assert (info.size, info.name, info.block_sizes) == (SIZE, "disk", (1, 4096, 32 * MIB))
        assert connection.option(Option.ABORT)[-1].type == Rep.ACK
        assert connection.is_closed_by_server()


@pytest.mark.parametrize("flags", [0, 1, 2, 3])
def test_export_name(address: str | tuple[str, int], flags: int) -> None:
    with Connection.open(address) as connection:
        export = connection.negotiate("disk", structured=False, export_name=True, flags=flags)
        assert export.size == SIZE
        assert len(connection.read(0, 512)) == 512
        connection.disconnect()


@pytest.mark.parametrize("mode", list(MODES))
def test_unknown_volume(address: str | tuple[str, int], mode: str) -> None:
    with Connection.open(address) as connection:
        with pytest.raises(BadReply, match=r'ERR_UNKNOWN.*"nobody"'):
            connection.negotiate("nobody", allocation=False, **MODES[mode])
        assert connection.option(Option.GO, info_data(b"disk"))[-1].type == Rep.ACK, "it may try another"
    with Connection.open(address) as connection:
        connection.greet()
        connection.send_option(Option.EXPORT_NAME, b"nobody")
        assert connection.is_closed_by_server()


def test_names(address: str | tuple[str, int]) -> None:
    with Connection.open(address) as connection:
        connection.greet()
        for name, kind in [
            (b"\xff\xfe", Rep.ERR_INVALID),
            (b"x" * 300, Rep.ERR_UNKNOWN),
            (b"y" * 5000, Rep.ERR_TOO_BIG),
        ]:
            reply = connection.option(Option.GO, info_data(name))[-1]
            assert reply.type == kind and reply.data.decode()
        assert connection.list_exports() == ["disk", "fixed"]


def test_options_that_are_none(address: str | tuple[str, int]) -> None:
    with Connection.open(address) as connection:
        connection.greet()
        for number in (0, 4, 12, 77, 2**32 - 1):
            assert connection.option(number, b"data")[-1].type == Rep.ERR_UNSUP
        assert connection.option(Option.STARTTLS)[-1].type == Rep.ERR_UNSUP
        assert connection.option(Option.GO, b"\xff" * 100)[-1].type == Rep.ERR_INVALID
        assert connection.option(Option.LIST, b"x")[-1].type == Rep.ERR_INVALID
        assert connection.option(99, bytes(65536))[-1].type == Rep.ERR_UNSUP, "the largest that is taken"


@pytest.mark.parametrize("length", [65537, 2**31, 2**32 - 1])
def test_option_of_absurd_length(address: str | tuple[str, int], length: int) -> None:
    with Connection.open(address) as connection:
        connection.greet()
        connection.send_option(Option.INFO, b"", length=length)
        reply = connection.option_reply()
        assert reply.type == Rep.ERR_TOO_BIG and str(length) in reply.data.decode()
        assert connection.is_closed_by_server()


def test_wrong_magic_in_the_handshake(address: str | tuple[str, int]) -> None:
    with Connection.open(address) as connection:
        connection.greet()
        connection.send_option(Option.LIST, magic=b"IHAVENOT")
        assert connection.is_closed_by_server()
    with Connection.open(address) as connection:
        connection.greet(flags=0xFFFFFFFF)
        assert connection.is_closed_by_server()
    with Connection.open(address) as connection:
        connection.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        connection.receive(18)
        assert connection.is_closed_by_server()


# --- Connections that break off ---


COOKIES = 0x1122334455667788, 0x8877665544332211


def conversation(extended: bool) -> bytes:
    """All that a client sends, from its flags to a WRITE, without waiting for an answer."""

    def option(number: int, data: bytes = b"") -> bytes:
        return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data

    return (
        struct.pack(">I", 3)
        + option(Option.EXTENDED_HEADERS if extended else Option.STRUCTURED_REPLY)
        + option(Option.SET_META_CONTEXT, meta_data(b"disk", [b"base:allocation"]))
        + option(Option.GO, info_data(b"disk", list(Info)))
        + request_bytes(Request(Command.READ, 0, COOKIES[0], 0, 4096), b"", extended)
        + request_bytes(Request(Command.WRITE, 32 if extended else 0, COOKIES[1], 4095, 40), b"z" * 40, extended)
    )


@pytest.mark.parametrize("extended", [False, True])
def test_dropped_at_each_byte(address: str | tuple[str, int], extended: bool) -> None:
    """Sent in one piece up to that byte: the server must also take what comes before it has answered."""
    whole = conversation(extended)
    for length in range(len(whole) + 1):
        with Connection.open(address) as connection:
            connection.send(whole[:length])
            if length % 3 == 0:  # some leave at once, some with a reset, some in order
                connection.sock.shutdown(socket.SHUT_WR)
                connection.receive(18)
            elif length % 3 == 1:
                connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.parametrize("extended", [False, True])
def test_sent_byte_by_byte(address: str | tuple[str, int], extended: bool) -> None:
    with Connection.open(address) as connection:
        for byte in conversation(extended):
            connection.send(bytes([byte]))
        stream = connection.receive(18)
        while not all(struct.pack(">Q", cookie) in stream for cookie in COOKIES):
            stream += connection.receive_some()


def test_client_that_says_nothing_or_stops(address: str | tuple[str, int]) -> None:
    """In the handshake, in a header, in a payload: the time is up after the configured seconds."""
    silent = Connection.open(address)
    silent.receive(18)
    half_option = Connection.open(address)
    half_option.greet()
    half_option.send(b"IHAVEOPT\0\0")
    no_payload = connect(address)
    no_payload.send(request_bytes(Request(Command.WRITE, 0, 5, 0, MIB), b"only this"))
    for connection in (silent, half_option, no_payload):
        with connection:
            assert connection.is_closed_by_server()


def test_client_that_never_reads(running: Server, address: str | tuple[str, int]) -> None:
    """It holds its own slots for the configured time, no more; others are served meanwhile."""
    before = counters(running, "nic")["reply_timeouts"]
    with connect(address) as deaf, connect(address) as other:
        deaf.sock.setblocking(False)
        try:
            for cookie in range(1000, 1400):
                deaf.sock.send(request_bytes(Request(Command.READ, 0, cookie, SIZE - MIB, MIB)))
        except BlockingIOError:
            pass
        for _ in range(50):
            assert len(other.read(SIZE - MIB, 65536)) == 65536
        wait_for("it is dropped", lambda: counters(running, "nic")["reply_timeouts"] > before, 20)


def test_connections_opened_and_abandoned(running: Server, address: str | tuple[str, int]) -> None:
    for _ in range(10):
        crowd = [Connection.open(address) for _ in range(100)]
        for index, connection in enumerate(crowd):
            if index % 2:
                connection.receive(18)
        for connection in crowd:
            connection.close()
    with connect(address) as connection:
        assert len(connection.read(0, 4096)) == 4096


# --- Requests ---


@pytest.mark.parametrize("mode", list(MODES))
def test_bad_requests(address: str | tuple[str, int], mode: str) -> None:
    options = MODES[mode]
    chunks = mode != "simple"
    with connect(address, **options) as connection:

        def refused(code: int, *words: str, **request: object) -> None:
            with pytest.raises(NbdError) as caught:
                connection.call(**request)  # type: ignore[arg-type]
            assert caught.value.code == code, caught.value
            for word in words if chunks else ():
                assert word in caught.value.text

        bad = ErrorCode.EINVAL
        refused(bad, "past the end", "disk", command=Command.READ, offset=SIZE - 1, length=2)
        refused(bad, "past the end", command=Command.READ, offset=2**63, length=2)
        refused(ErrorCode.ENOSPC, "past the end", command=Command.WRITE, offset=SIZE - 1, payload=b"ab")
        refused(ErrorCode.ENOSPC, "past the end", command=Command.WRITE_ZEROES, offset=SIZE, length=1)
        refused(bad, "past the end", command=Command.TRIM, offset=SIZE, length=1)
        for command in (Command.READ, Command.TRIM, Command.WRITE_ZEROES, Command.CACHE):
            refused(bad, "length 0", command=command, offset=0, length=0)
        refused(ErrorCode.EOVERFLOW if chunks else bad, "limit", command=Command.READ, offset=0, length=32 * MIB + 1)
        refused(bad, "command 200", command=200, offset=0, length=1)
        refused(bad, "flags", command=Command.READ, offset=0, length=1, flags=0x8000)
        refused(bad, "flags", command=Command.TRIM, offset=0, length=1, flags=CommandFlag.NO_HOLE)
        refused(bad, "no range", command=Command.FLUSH, offset=4096)
        if not chunks:
            refused(bad, command=Command.BLOCK_STATUS, offset=0, length=1)
        connection.write(0, b"good")
        assert connection.read(0, 4) == b"good"
        connection.disconnect()


def test_who_came_by_export_name_was_told_no_limit(address: str | tuple[str, int]) -> None:
    """nbd-tester-client of the NBD project, for one, sends 48 MiB at once."""
    contents = bytes(range(256)) * 4096 * 48
    with connect(address, export_name=True) as connection:
        connection.write(12345, contents)
        assert connection.read(12345, len(contents)) == contents
        connection.write_zeroes(0, 63 * MIB)
        with pytest.raises(NbdError, match="limit" if connection.export.structured else None):
            connection.read(0, 64 * MIB + 1)


def test_payload_over_the_limit(address: str | tuple[str, int]) -> None:
    """With compact headers the payload is thrown away and the connection goes on; with extended ones it is closed."""
    with connect(address) as connection:
        with pytest.raises(NbdError, match="limit") as caught:
            connection.write(0, bytes(33 * MIB))
        assert caught.value.code == ErrorCode.EINVAL
        connection.write(0, b"x" * 32 * MIB)
        assert connection.read(32 * MIB - 4, 4) == b"xxxx"
        connection.write_zeroes(0, 32 * MIB)
    with connect(address, extended=True) as connection:
        connection.submit(Command.WRITE, 0, 2**40, CommandFlag.PAYLOAD_LEN)
        error = connection.reply().error
        assert error is not None and "limit" in error.text
        assert connection.is_closed_by_server()


def test_refused_payload_does_not_upset_what_follows(address: str | tuple[str, int]) -> None:
    """Errors to writes while their payload is still on its way, pipelined with good requests."""
    with connect(address) as connection:
        cookies = []
        for index in range(20):
            cookies.append(connection.submit(Command.WRITE, SIZE, payload=bytes(300000)))
            cookies.append(connection.submit(Command.WRITE, index * 4096, payload=bytes([index + 1]) * 4096))
        for index, cookie in enumerate(cookies):
            assert (connection.wait(cookie).error is None) == bool(index % 2)
        assert connection.read(0, 20 * 4096) == b"".join(bytes([i + 1]) * 4096 for i in range(20))


def test_read_only_volume(address: str | tuple[str, int]) -> None:
    with connect(address, "fixed") as connection:
        assert connection.export is not None and TransmissionFlag.READ_ONLY in connection.export.flags
        for call in (
            lambda: connection.write(0, bytes(300000)),
            lambda: connection.trim(0, 1),
            lambda: connection.write_zeroes(0, 1),
        ):
            with pytest.raises(NbdError, match="read-only") as caught:
                call()
            assert caught.value.code == ErrorCode.EPERM
        assert connection.read(0, 4096) == bytes(4096)


@pytest.mark.parametrize("mode", list(MODES))
def test_wrong_magic(address: str | tuple[str, int], mode: str) -> None:
    with connect(address, **MODES[mode]) as connection:
        connection.write(0, b"x")
        connection.submit(Command.READ, 0, 1, magic=0x12345678)
        assert connection.is_closed_by_server()
    other = 0x21E41C71 if mode != "extended" else 0x25609513
    with connect(address, **MODES[mode]) as connection:
        connection.send(struct.pack(">I", other) + bytes(60))
        assert connection.is_closed_by_server(), "the other kind of header was not negotiated"


@pytest.mark.parametrize("mode", list(MODES))
def test_disc_after_many_requests(address: str | tuple[str, int], mode: str) -> None:
    with connect(address, **MODES[mode]) as connection:
        cookies = [connection.submit(Command.READ, 0, MIB) for _ in range(8)]
        cookies += [connection.submit(Command.WRITE, i * 8192, payload=b"d" * 8192) for i in range(50)]
        connection.submit(Command.DISC)
        for cookie in cookies:
            assert connection.wait(cookie).error is None
        assert connection.is_closed_by_server()


@pytest.mark.parametrize("mode", list(MODES))
def test_garbage(address: str | tuple[str, int], mode: str) -> None:
    """Headers with every field at random: each is answered, or the connection ends; it never hangs."""
    chance = random.Random(SEED)
    print(f"seed {SEED}")
    for _ in range(20):
        with connect(address, **MODES[mode]) as connection:
            extended = mode == "extended"
            try:
                for _ in range(20):
                    payload = b""
                    command, flags = (
                        chance.randrange(12),
                        chance.choice([0, chance.randrange(64), chance.randrange(65536)]),
                    )
                    length = chance.choice([0, 1, 4096, chance.randrange(2**20)])
                    carries = flags & 32 if extended else command == Command.WRITE
                    if carries:
                        payload = bytes(length)
                    if command == Command.DISC:
                        continue
                    offset = chance.choice([0, chance.randrange(SIZE - 2 * MIB), chance.randrange(2**64)])
                    request = Request(command, flags, connection._next_cookie, offset, length)
                    connection._next_cookie += 1
                    connection.decoder.expect(request)
                    connection.send(request_bytes(request, payload, extended))
                    connection.wait(request.cookie)
            except Dropped:
                pass


def test_volume_made_grown_and_deleted_under_a_client(running: Server, address: str | tuple[str, int]) -> None:
    running.cli("volume", "create", "brief", str(MIB))
    with connect(address, "brief") as connection:
        connection.write(MIB - 4, b"last")
        with pytest.raises(NbdError, match="past the end"):
            connection.read(MIB, 1)
        running.cli("volume", "resize", "brief", str(2 * MIB))
        assert connection.read(MIB - 4, 8) == b"last\0\0\0\0"
        done = running.cli("volume", "delete", "brief", status=None)
        if done.returncode == 0:  # else it is refused while in use
            with pytest.raises(NbdError, match="deleted") as caught:
                connection.read(0, 1)
            assert caught.value.code == ErrorCode.ESHUTDOWN
        else:
            assert "use" in done.stderr, done.stderr
            connection.disconnect()
            wait_for("it can be deleted", lambda: not running.cli("volume", "delete", "brief", status=None).returncode)
    with Connection.open(address) as connection, pytest.raises(BadReply, match="ERR_UNKNOWN"):
        connection.negotiate("brief", allocation=False)
