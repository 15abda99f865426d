"""io_uring instances that outlive their domain: kills with reads in flight, stale entries, files that another process
registered."""

import errno
import mmap
import os
import resource
import secrets
import signal
from pathlib import Path

import pytest

from atoll.ipc import objects, physmap, uring
from atoll.ipc._ipc import ffi, lib

pytestmark = pytest.mark.skipif(not uring.available()[0], reason=f"io_uring: {uring.available()[1]}")

IORING_OP_NOP, IORING_OP_READ = 0, 22
BLOCK = 4096


@pytest.fixture
def handle():
    made = uring.create(64, 256, 16)
    yield made
    made.close()


def run_child(main) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            main()
        except BaseException as error:
            print(repr(error))
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def completions(ring, wanted: int, seconds: float = 30) -> dict[int, int]:
    """user_data → result of `wanted` completions; each user_data once."""
    found: dict[int, int] = {}
    space = ffi.new("struct atoll_uring_completion[64]")
    while len(found) < wanted:
        assert lib.atoll_uring_wait(ring, int(seconds * 1e9)) == 1, f"{len(found)} of {wanted} completions"
        count = lib.atoll_uring_peek(ring, space, 64)
        for at in range(count):
            assert space[at].user_data not in found
            found[space[at].user_data] = space[at].result
        lib.atoll_uring_advance(ring, count)
    return found


def fill_read(ring, file_index: int, address: int, offset: int, user_data: int) -> int:
    position = lib.atoll_uring_next(ring)
    assert lib.atoll_uring_fill_read(ring, file_index, address, BLOCK, offset, user_data) == 1
    return position


def test_reads_in_flight_at_a_kill_complete_in_the_ring(handle: uring.UringHandle, tmp_path: Path) -> None:
    """The child registers the file in a table it did not make, submits 32 direct reads and is killed at once."""
    file = tmp_path / "device"
    file.write_bytes(b"".join(bytes([number + 1]) * BLOCK for number in range(64)))
    memory = mmap.mmap(-1, 64 * BLOCK)
    view = ffi.from_buffer(memory)
    address = int(ffi.cast("uintptr_t", view))
    os.sync()
    try:
        fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        fd = os.open(file, os.O_RDONLY)

    def main() -> None:
        ring = handle.attach()
        handle.register_file(3, fd)
        for number in range(32):
            fill_read(ring, 3, address + number * BLOCK, number * BLOCK, number)
        assert lib.atoll_uring_submit(ring) == 32
        fill_read(ring, 3, address + 40 * BLOCK, 40 * BLOCK, 999)  # filled in, never submitted
        os.kill(os.getpid(), signal.SIGKILL)

    cut_off = 0
    for turn in range(10):
        memory[:] = bytes(64 * BLOCK)
        assert run_child(main) == -signal.SIGKILL
        ring = handle.attach()
        assert ring.attached_head == 32 * (turn + 1)
        found = completions(ring, 32)
        assert sorted(found) == list(range(32))
        for number, result in found.items():
            # What a worker thread of the dead one executed may be cut off: it is to be repeated.
            assert result in (BLOCK, -errno.EINTR, -errno.ECANCELED)
            cut_off += result < 0
            assert result < 0 or memory[number * BLOCK] == number + 1
        lib.atoll_uring_submit(ring)  # the stale entry is not executed
        assert lib.atoll_uring_wait(ring, 5_000_000) == 0
        lib.atoll_uring_detach(ring)
    print(f"{cut_off} of 320 reads were cut off by the kill")
    ffi.release(view)
    os.close(fd)


def test_the_positions_tell_what_was_submitted(handle: uring.UringHandle) -> None:
    shared = mmap.mmap(-1, 4096)  # what the intents would be

    def main() -> None:
        ring = handle.attach()
        for number in range(8):
            shared[number] = lib.atoll_uring_next(ring)
            lib.atoll_uring_fill_nop(ring, number)
            if number == 4:
                assert lib.atoll_uring_submit(ring) == 5
        os.kill(os.getpid(), signal.SIGKILL)

    assert run_child(main) == -signal.SIGKILL
    ring = handle.attach()
    assert [lib.atoll_uring_consumed(ring, shared[number]) for number in range(8)] == [True] * 5 + [False] * 3
    assert sorted(completions(ring, 5)) == [0, 1, 2, 3, 4]
    assert lib.atoll_uring_next(ring) == 5
    lib.atoll_uring_fill_nop(ring, 77)
    assert lib.atoll_uring_submit(ring) == 1
    assert completions(ring, 1) == {77: 0}
    lib.atoll_uring_detach(ring)


def test_a_completion_not_advanced_over_is_seen_again(handle: uring.UringHandle) -> None:
    def main() -> None:
        ring = handle.attach()
        lib.atoll_uring_fill_nop(ring, 5)
        lib.atoll_uring_submit(ring)
        space = ffi.new("struct atoll_uring_completion[1]")
        assert lib.atoll_uring_wait(ring, 10**9) == 1
        assert lib.atoll_uring_peek(ring, space, 1) == 1

    assert run_child(main) == 0
    ring = handle.attach()
    assert completions(ring, 1) == {5: 0}
    lib.atoll_uring_detach(ring)


def test_the_queues_are_not_inherited(handle: uring.UringHandle) -> None:
    def rings_mapped() -> int:
        return Path("/proc/self/maps").read_text().count("io_uring")

    ring = handle.attach()
    assert rings_mapped() > 0

    def main() -> None:
        assert rings_mapped() == 0

    assert run_child(main) == 0
    lib.atoll_uring_detach(ring)
    assert rings_mapped() == 0


def test_the_submission_queue_says_when_it_is_full(handle: uring.UringHandle) -> None:
    ring = handle.attach()
    filled = 0
    while lib.atoll_uring_fill_nop(ring, filled):
        filled += 1
    assert filled == 64 and lib.atoll_uring_room(ring) == 0
    assert lib.atoll_uring_submit(ring) == 64
    assert len(completions(ring, 64)) == 64
    lib.atoll_uring_detach(ring)


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(uring.UringError, match="cannot map the queues"):
        uring.UringHandle(0, bytearray(ffi.sizeof("struct atoll_uring_parameters"))).attach()


# --- Storage ---------------------------------------------------------------------------------------------------------

ROLE = int(lib.ATOLL_ROLE_DISK)
SIZE = 4 << 20
IORING_OP_READ_FIXED, IORING_OP_WRITE_FIXED, IORING_OP_SEND = 4, 5, 26


@pytest.fixture
def arena():
    """An arena of the role, mapped here, that nobody else knows."""
    name = objects.arena_name(secrets.randbits(63), "disk")
    fd = objects.create(name, SIZE)
    physmap.map_arena(ROLE, fd, SIZE, writable=True)
    os.close(fd)
    yield physmap.address(ROLE)
    physmap.unmap_arena(ROLE)
    objects.unlink(name)


@pytest.fixture
def storage():
    made = uring.create_storage(64, 256)
    if not made.takes_sources:
        made.close()
        pytest.skip("before Linux 6.15")
    yield made
    made.close()


def fill(ring, opcode: int, fd: int, address: int, offset: int, user_data: int) -> None:
    """As fill_read, of another operation, on a descriptor and the registered buffer at `address`."""
    position = fill_read(ring, fd, address, offset, user_data)
    sqes = ffi.cast("uint8_t *", ring.liburing[7])  # struct io_uring_sq: seven pointers, then the entries
    entry = sqes + 64 * (position & 63)
    entry[0], entry[1] = opcode, 0
    ffi.cast("uint16_t *", entry + 40)[0] = (address - lib.ATOLL_MAP_BASE) // lib.ATOLL_URING_PIECE_BYTES


def test_an_arena_is_written_from_and_never_to(storage: uring.UringHandle, arena: int, tmp_path: Path) -> None:
    """Who uses the ring need not have it mapped. The operating system itself refuses what would change it, so a
    driver that goes wrong cannot reach by the ring what it cannot reach by its map (I1)."""
    assert run_child(lambda: storage.register_source(ROLE, SIZE)) != 0, "a child does not have the map"
    storage.register_source(ROLE, SIZE)
    assert storage.source_bytes == SIZE
    memory = ffi.buffer(ffi.cast("char *", arena), SIZE)
    memory[:BLOCK] = b"a" * BLOCK

    device = tmp_path / "device"
    device.write_bytes(bytes(4 * BLOCK))

    def writes() -> None:
        assert lib.atoll_mapped_bytes(ROLE) == 0
        ring = storage.attach()
        fd = os.open(device, os.O_RDWR)
        fill(ring, IORING_OP_WRITE_FIXED, fd, arena, BLOCK, 1)
        fill(ring, IORING_OP_READ_FIXED, fd, arena, 2 * BLOCK, 2)
        assert lib.atoll_uring_submit(ring) == 2
        fill(ring, IORING_OP_SEND, fd, arena, 0, 3)
        assert lib.atoll_uring_submit(ring) == 1
        assert completions(ring, 3) == {1: BLOCK, 2: -errno.EACCES, 3: -errno.EACCES}

    assert run_child(writes) == 0
    data = device.read_bytes()
    assert data[BLOCK : 2 * BLOCK] == b"a" * BLOCK and not any(data[:BLOCK]) and not any(data[2 * BLOCK :])
    assert memory[:] == b"a" * BLOCK + bytes(SIZE - BLOCK)


def test_what_may_not_be_pinned_is_said() -> None:
    """Without CAP_IPC_LOCK RLIMIT_MEMLOCK is the bound."""
    if os.getuid() != 0:
        pytest.skip("only root can become somebody without rights")

    def unprivileged() -> None:
        os.setuid(65534)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (SIZE // 2, SIZE // 2))
        physmap.map_arena(ROLE, arena_fd, SIZE, writable=True)
        made = uring.create_storage(64, 256)
        if made.takes_sources:
            with pytest.raises(uring.UringError, match=f"cannot pin {SIZE} bytes at 0x") as caught:
                made.register_source(ROLE, SIZE)
            assert caught.value.errno == errno.ENOMEM and made.source_bytes == 0

    name = objects.arena_name(secrets.randbits(63), "disk")
    arena_fd = objects.create(name, SIZE)
    assert run_child(unprivileged) == 0
    objects.unlink(name)
    os.close(arena_fd)
