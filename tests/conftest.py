"""Fixtures for the whole suite: a real server, started as users start it.

- `server`           one per test, fresh
- `module_server`    one per test file (tests leave it usable: each makes volumes of its own)
- `make_server`      a factory, for tests that start several or with another configuration
- `hooked`           dedup's extension, built so that a test can have it die after any store

Each is a `serverkit.Server` on a data directory of its own, with small buffers, listening on a Unix socket and a free
TCP port. At the end it is stopped; whatever still holds its data directory is killed by pid; a process or a
shared-memory object left behind fails the test. The log of a server is shown with a failing test that uses it.
"""

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
from hypothesis import HealthCheck, settings
from serverkit import Server

# Of time hypothesis asks for less than 200 ms for each example, and that they are found quickly: a machine that is busy
# with something else decides that, not the program. What takes too long ends by pytest's timeout.
settings.register_profile("atoll", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("atoll")


@pytest.fixture(scope="session")
def hooked(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """dedup's extension with a hook behind each store of the journal."""
    from dedupkit import build_hooked

    return build_hooked(tmp_path_factory.mktemp("hooked"))


@pytest.fixture
def make_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def make(**settings: object) -> Server:
        server = Server(tmp_path_factory.mktemp("s"), **settings)  # a short path: sockets lie in it
        servers.append(server)
        return server

    yield make
    end(servers)


@pytest.fixture
def server(make_server: Callable[..., Server]) -> Server:
    return make_server().start()


@pytest.fixture(scope="module")
def module_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("m"))
    try:
        yield server.start()
    finally:
        end([server])


def end(servers: list[Server]) -> None:
    left = [line for server in servers for line in server.end()]
    assert not left, "left behind:\n" + "\n".join(left)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):  # type: ignore[no-untyped-def]
    report = yield
    if report.failed:
        for server in Server.alive:
            report.sections.append((f"log of the server on {server.data}", server.log_tail()))
    return report
