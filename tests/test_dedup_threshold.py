"""The run threshold (THN) at destage: what is shared, and what is written again, for layouts that are known."""

import random
from collections.abc import Callable, Iterator

import pytest
from dedupkit import BLOCK, OK, Stage
from serverkit import Server

MIB = 1 << 20
WHOLE = 1 << 20  # blocks of a track that holds the whole device


def blocks(seed: int, count: int) -> list[bytes]:
    source = random.Random(seed)
    return [source.randbytes(BLOCK) for _ in range(count)]


class Bench:
    """A stage, and what its volumes hold."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.content: dict[tuple[int, int], bytes] = {}

    def write(self, volume: int, lba: int, data: list[bytes], drain: bool = True) -> None:
        for at in range(0, len(data), 64):
            piece = data[at : at + 64]
            self.stage.write(volume, (lba + at) * BLOCK, b"".join(piece))
            for index, block in enumerate(piece):
                self.content[volume, lba + at + index] = block
        if drain:
            self.stage.drain()

    def stored(self) -> int:
        return int(self.stage.figures().stored_blocks)

    def new_blocks(self, volume: int, lba: int, data: list[bytes]) -> int:
        """Writes and says how many blocks were stored anew."""
        before = self.stored()
        self.write(volume, lba, data)
        return self.stored() - before

    def places(self, volume: int, lba: int, count: int) -> list[int]:
        values = self.stage.ffi.new("uint64_t[]", count)
        fast = self.stage.ffi.new("uint8_t[]", count)
        reached = self.stage.lib.dedup_map(self.stage.state, volume, lba, count, values, fast, 0)
        assert reached == self.stage.lib.DEDUP_REASON_REACHED
        return [int(value) & (1 << 60) - 1 for value in values]

    def verify(self) -> None:
        for (volume, lba), block in self.content.items():
            request = self.stage.read(volume, lba * BLOCK, BLOCK)
            self.stage.run_until_idle()
            assert request.status == OK and request.data == block, f"volume {volume} block {lba}"
        self.stage.check()


@pytest.fixture(params=[WHOLE], ids=["one track"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    with Stage(track_blocks=request.param, nic_pages=1024) as stage:
        stage.open()
        bench = Bench(stage)
        yield bench
        bench.verify()


@pytest.mark.parametrize("threshold", [1, 2, 4, 8])
def test_a_run_is_shared_from_the_threshold_on(bench: Bench, threshold: int) -> None:
    source = bench.stage.create_volume("source", 4 * MIB, threshold=1)
    copy = bench.stage.create_volume("copy", 4 * MIB, threshold=threshold)
    stored = blocks(1, 40)
    bench.write(source, 0, stored)
    # Rows of each length that match, with blocks of their own between them.
    at, lengths = 0, (1, 2, 3, 4, 5, 7, 8, 9)
    run: list[bytes] = []
    for length in lengths:
        run += [*blocks(100 + at, 2), *stored[at : at + length]]
        at += length
    expected = 2 * len(lengths) + sum(length for length in lengths if length < threshold)
    assert bench.new_blocks(copy, 5, run) == expected
    counted = bench.stage.counters()
    assert counted["threshold_blocks"] == expected - 2 * len(lengths)
    assert counted["shared_blocks"] == sum(lengths) - counted["threshold_blocks"]


def test_scattered_places_are_no_run(bench: Bench) -> None:
    """Equal blocks, stored each by itself: shared one by one, or not at all."""
    source = bench.stage.create_volume("source", 4 * MIB)
    data = blocks(2, 16)
    for index in random.Random(2).sample(range(16), 16):
        bench.write(source, 100 + 2 * index, [data[index]])
    assert bench.new_blocks(bench.stage.create_volume("two", 4 * MIB, threshold=2), 0, data) >= 12
    assert bench.new_blocks(bench.stage.create_volume("one", 4 * MIB, threshold=1), 0, data) == 0


def test_of_several_copies_the_one_in_sequence_is_shared(bench: Bench) -> None:
    source = bench.stage.create_volume("source", 4 * MIB, threshold=64)
    copy = bench.stage.create_volume("copy", 4 * MIB, threshold=8)
    data = blocks(3, 16)
    for index in (3, 11, 7):
        bench.write(source, 500 + index, [data[index], *blocks(30 + index, 1)])
    bench.write(source, 0, data)  # again, in sequence
    for index in (2, 8):
        bench.write(source, 600 + index, [data[index], *blocks(60 + index, 1)])
    assert bench.new_blocks(copy, 0, data) == 0
    assert bench.places(copy, 0, 16) == bench.places(source, 0, 16)


def test_a_run_goes_on_over_batches(bench: Bench) -> None:
    """More blocks than a batch holds, and matches that begin and end just beside the cut."""
    source = bench.stage.create_volume("source", 8 * MIB)
    copy = bench.stage.create_volume("copy", 8 * MIB, threshold=8)
    stored = blocks(4, 400)
    bench.write(source, 0, stored)
    assert bench.new_blocks(copy, 0, stored[:300]) == 0
    for own, length in ((125, 20), (121, 131), (128, 8), (124, 8), (3, 127)):
        fresh = blocks(own * 1000 + length, own)
        assert bench.new_blocks(copy, 700, fresh + stored[:length]) == own, (own, length)
        bench.stage.trim(copy, 700 * BLOCK, 400 * BLOCK)
        bench.stage.drain()
        for lba in range(400):
            bench.content.pop((copy, 700 + lba), None)
    assert bench.stage.counters()["held_back_blocks"] > 0


def test_a_run_that_is_still_being_written_waits_for_its_rest() -> None:
    """A destage that comes in the middle of a client's sequential write does not cut the match."""
    with Stage(destage_delay_ms=60000, track_blocks=WHOLE) as stage:
        stage.open()
        bench = Bench(stage)
        source, other = stage.create_volume("source", 4 * MIB), stage.create_volume("other", 4 * MIB)
        copy = stage.create_volume("copy", 4 * MIB, threshold=8)
        stored = blocks(5, 24)
        bench.write(source, 0, stored, drain=False)
        stage.flush(source)
        stage.run_until_idle()
        bench.write(other, 0, blocks(50, 1), drain=False)
        stage.flush(other)  # of what came before it: the next block's destage takes the batch along
        bench.write(copy, 0, stored[:4], drain=False)
        stage.run_until_idle()
        assert bench.stored() == 24 + 1
        assert stage.counters()["held_back_blocks"] == 4
        bench.write(copy, 4, stored[4:], drain=False)
        stage.flush(copy)
        stage.run_until_idle()
        assert bench.stored() == 24 + 1
        bench.verify()


@pytest.mark.parametrize("threshold", [2, 8, 64])
def test_the_same_content_again_is_free(bench: Bench, threshold: int) -> None:
    volume = bench.stage.create_volume("volume", 4 * MIB, threshold=threshold)
    data = blocks(6, 10)
    assert bench.new_blocks(volume, 0, data) == 10
    places = bench.places(volume, 0, 10)
    assert bench.new_blocks(volume, 4, data[4:5]) == 0
    assert bench.new_blocks(volume, 0, data) == 0
    assert bench.places(volume, 0, 10) == places


def test_what_stands_beside_it_counts(bench: Bench) -> None:
    """A client that writes a copy block by block: each is in sequence with the one before."""
    source = bench.stage.create_volume("source", 4 * MIB)
    copy = bench.stage.create_volume("copy", 4 * MIB, threshold=4)
    stored = blocks(7, 20)
    bench.write(source, 0, stored)
    bench.write(copy, 0, stored[:4])
    assert sum(bench.new_blocks(copy, index, [stored[index]]) for index in range(4, 20)) == 0
    assert bench.new_blocks(copy, 40, [stored[5]]) == 1


def test_equal_rows_within_a_batch(bench: Bench) -> None:
    volume = bench.stage.create_volume("volume", 4 * MIB, threshold=4)
    row = blocks(8, 6)
    assert bench.new_blocks(volume, 0, [*row, *row, *blocks(80, 1), *row[1:5], *row[2:4]]) == 6 + 1 + 2
    one = blocks(81, 1)
    assert bench.new_blocks(volume, 100, one * 20) == 4
    single = bench.stage.create_volume("single", 4 * MIB, threshold=1)
    assert bench.new_blocks(single, 100, blocks(82, 1) * 20) == 1


@pytest.mark.parametrize("length", [3, 4])
def test_a_row_that_is_being_written_is_followed_by_the_same_rule(length: int) -> None:
    with Stage(track_blocks=WHOLE) as stage:
        stage.open()
        bench = Bench(stage)
        first = stage.create_volume("first", 4 * MIB)
        second = stage.create_volume("second", 4 * MIB, threshold=4)
        row = blocks(9, 10)
        before = bench.stored()
        bench.write(first, 0, row, drain=False)
        for _ in range(10):
            stage.turn()
        stage.take_ios()
        assert stage.ios, "the first is being written"
        bench.write(second, 7, row[2 : 2 + length], drain=False)
        for _ in range(10):
            stage.turn()
        stage.drain()
        assert bench.stored() - before == 10 + (0 if length >= 4 else length)
        bench.verify()


def test_a_track_ends_a_run() -> None:
    with Stage(track_blocks=64) as stage:
        stage.open()
        bench = Bench(stage)
        source = stage.create_volume("source", 4 * MIB)
        copy = stage.create_volume("copy", 4 * MIB, threshold=8)
        stored = blocks(10, 200)
        bench.write(source, 0, stored)
        places = bench.places(source, 0, 200)
        assert places == list(range(places[0], places[0] + 200)), "the layout that the test is about"
        first = 64 - places[0] % 64  # the block that begins a track
        assert bench.new_blocks(copy, 0, stored[first - 4 : first + 20]) == 4
        assert bench.new_blocks(copy, 100, stored[first - 5 : first + 5]) == 10
        assert bench.new_blocks(copy, 200, stored[first - 8 : first + 8]) == 0
        bench.verify()


def test_a_threshold_is_set_online(bench: Bench) -> None:
    stage = bench.stage
    source = stage.create_volume("source", 4 * MIB)
    copy = stage.create_volume("copy", 4 * MIB)
    stored = blocks(11, 4)
    bench.write(source, 0, stored)
    assert bench.new_blocks(copy, 0, stored[:2]) == 0
    reason = stage.ffi.new("char[256]")
    assert stage.lib.dedup_volume_set(stage.state, copy, 4, 0, 0, reason) == OK
    assert bench.new_blocks(copy, 10, stored[:2]) == 2
    assert stage.lib.dedup_volume_set(stage.state, copy, 65, 0, 0, reason) != OK
    assert stage.ffi.string(reason) == b"a run threshold is 1 to 64 blocks"
    assert int(stage.lib.dedup_volume(stage.state, copy).threshold) == 4


def test_an_overwritten_block_is_no_candidate(bench: Bench) -> None:
    """Invalidation by place: nothing is read to compare with what is stored no more, nor with what took its place."""
    volume = bench.stage.create_volume("volume", 4 * MIB)
    old = blocks(12, 30)
    bench.write(volume, 0, old)
    bench.write(volume, 0, blocks(13, 30))
    for _ in range(4):  # the places are free after a sync, and used again
        bench.stage.flush(volume)
        bench.stage.drain()
        bench.write(volume, 200, blocks(bench.stored(), 100))
    bench.stage.io_log.clear()
    assert bench.new_blocks(volume, 400, old) == 30
    reads = [io for io in bench.stage.io_log if io.opcode == bench.stage.lib.ATOLL_OP_IO_READ]
    assert reads == []
    assert bench.stage.counters()["compare_mismatches"] == 0


def test_a_small_cache_costs_no_savings() -> None:
    """Batches that read what they compare with do not begin before there are pages for it."""
    with Stage(nic_pages=2048, cache_pages=456, track_blocks=WHOLE, device_blocks=16384) as stage:
        stage.open()
        bench = Bench(stage)
        source, copy = stage.create_volume("source", 8 * MIB), stage.create_volume("copy", 8 * MIB)
        stored = blocks(14, 1500)
        bench.write(source, 0, stored)
        before = bench.stored()
        bench.write(copy, 0, stored, drain=False)
        for _ in range(40):
            stage.turn()  # all that can begin has begun before the device answers
        stage.drain()
        assert bench.stored() == before
        assert stage.counters()["match_skipped"] == 0


def test_thresholds_are_kept_and_shown(make_server: Callable[..., Server]) -> None:
    """From the configuration, from the command line, over a restart; a wrong one is named."""
    server = make_server(config={"volumes": [{"name": "disk", "size": "64MiB", "threshold": 4}]}).start()

    def shown() -> dict[str, tuple[int, int]]:
        listed = server.json("volume", "list")
        assert listed == server.json("status")["volumes"]
        return {volume["name"]: (volume["threshold"], volume["tier_threshold"]) for volume in listed}

    assert shown() == {"disk": (4, 8)}
    server.cli("volume", "create", "other", "64MiB", "--threshold", "16", "--tier-threshold", "2")
    assert server.json("volume", "set", "disk", "--threshold", "64")["threshold"] == 64
    server.cli("volume", "set", "other", "--tier-threshold", "100")
    assert shown() == {"disk": (64, 8), "other": (16, 100)}
    wrong = server.cli("volume", "set", "disk", "--threshold", "65", status=2)
    assert "65 is not in the range 1<=x<=64" in wrong.stderr
    assert "say what to change" in server.cli("volume", "set", "disk", status=2).stderr
    assert "there is no volume 'none'" in server.cli("volume", "set", "none", "--threshold", "2", status=4).stderr
    server.stop()
    server.start()
    assert shown() == {"disk": (64, 8), "other": (16, 100)}
    assert "has threshold 64, the configuration says 4: left as it is" in server.log_tail()


def test_those_that_must_go_do_not_wait_for_what_follows() -> None:
    """Pages for ragged blocks are short, so what is logged is written though it might become a longer run. It was held
    back and taken again, without end."""
    with Stage(merge_pages=8, destage_delay_ms=10_000_000) as stage:
        stage.open()
        volume = stage.create_volume("v", 256 * BLOCK, threshold=8)
        contents = [content[:-1] for content in blocks(1, 16)]
        stage.write(volume, 0, b"".join(content + bytes(1) for content in contents))
        stage.flush(volume)
        stage.drain()
        for number in range(7):
            stage.write(volume, (100 + number) * BLOCK, contents[number])
        for _ in range(1000):
            if not stage.turn() and not stage.disk():
                break
            stage.answers()
        else:
            raise AssertionError("it does not rest")
        assert stage.figures().log_records == 0
        stage.check()
