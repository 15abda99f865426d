"""Pages of metadata that logged blocks hold in memory: as many as are left by those that a checkpoint lets go."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable

from dedupkit import BLOCK, NO_HOLE, OK, Io, Request, Stage

from atoll.ipc._ipc import lib

LEAF = 512 * BLOCK
FRAMES = 128  # the fewest


def block(seed: int) -> bytes:
    return random.Random(seed).randbytes(BLOCK)


def test_logged_blocks_hold_all_that_may_be_held() -> None:
    """Leaves that are dirty take more logged blocks. When a checkpoint has written them, only these hold them, with all
    their directories: more than destage was to leave. It goes on, though there is nothing to wait for."""
    with Stage(device_blocks=3000, frames=FRAMES, destage_delay_ms=10_000_000) as stage:
        stage.open()
        first, second, count = struct.unpack_from(
            "<QQI", stage.device, BLOCK + 288
        )  # of the superblock: where pages are
        volumes = [stage.create_volume(f"v{number}", 1024 * LEAF) for number in range(8)]
        stage.run_until_idle()
        held: list[Io] = []

        def turn() -> None:
            stage.turn()
            stage.take_ios()
            for io in list(stage.ios):
                page = io.offset // BLOCK
                if io.opcode == lib.ATOLL_OP_IO_WRITE and (
                    first <= page < first + count or second <= page < second + count
                ):
                    stage.ios.remove(io)
                    held.append(io)
                else:
                    stage.complete(io)
            stage.answers()

        def on_all(submit: Callable[[int, int], Request]) -> int:
            done = 0
            for number, volume in enumerate(volumes):
                request = submit(volume, number * 100 * LEAF)
                for _ in range(50):
                    turn()
                done += request.done
            return done

        on_all(lambda volume, offset: stage.zero(volume, offset + BLOCK, BLOCK, NO_HOLE))
        assert held, "a checkpoint is under way"
        written = on_all(lambda volume, offset: stage.write(volume, offset, block(volume)))
        assert written >= 5
        for io in held:
            stage.ios.append(io)
        deadline = time.monotonic() + 20
        while stage.ios or stage.figures().metadata_cache_dirty:
            stage.turn()
            stage.disk()
            stage.answers()
            if time.monotonic() > deadline:
                break
        print(stage.figures().metadata_cache_held, stage.figures().metadata_cache_dirty, stage.figures().log_records)
        flushes = [stage.flush(volume) for volume in volumes]
        stage.run_until_idle(timeout_s=10)
        assert all(flush.status == OK for flush in flushes)
        stage.check()
