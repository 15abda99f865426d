"""The run matcher beside a search of all choices, and by example."""

import importlib
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

_dedup = importlib.import_module("atoll.services.dedup._dedup")
ffi, lib = _dedup.ffi, _dedup.lib
NONE = int(lib.RUNS_NONE)
Neighbour = tuple[int, int]  # place, length


@dataclass
class Run:
    """places[i]: where blocks equal to block i are stored; free: of these, those that the rule does not hold for."""

    places: list[list[int]]
    threshold: int
    track: int = 64
    free: frozenset[int] = frozenset()
    before: Neighbour = (0, 0)
    after: Neighbour = (0, 0)

    def raw(self) -> tuple[Any, Any]:
        blocks = ffi.new("struct runs_block[]", len(self.places))
        for block, places in zip(blocks, self.places, strict=True):
            block.count = len(places)
            block.places[0 : len(places)] = places
            block.free = sum(1 << index for index, place in enumerate(places) if place in self.free)
        rule = ffi.new("struct runs_rule *")
        rule.threshold, rule.track_blocks = self.threshold, self.track
        rule.before.place, rule.before.length = self.before
        rule.after.place, rule.after.length = self.after
        return blocks, rule

    def match(self) -> list[int | None]:
        """For each block the place that it shares."""
        blocks, rule = self.raw()
        choice = ffi.new("uint8_t[]", len(self.places))
        lib.runs_match(blocks, len(self.places), rule, choice)
        return [None if c == NONE else places[c] for c, places in zip(choice, self.places, strict=True)]

    def open_tail(self) -> int:
        blocks, rule = self.raw()
        choice = ffi.new("uint8_t[]", len(self.places))
        lib.runs_match(blocks, len(self.places), rule, choice)
        return int(lib.runs_open_tail(blocks, len(self.places), rule, choice))

    # --- The oracle ---

    def follows(self, place: int, then: int) -> bool:
        return then == place + 1 and then // self.track == place // self.track

    def pieces(self, chosen: list[int | None]) -> list[tuple[int, int]]:
        """Longest rows of blocks that stand in sequence: (first, end)."""
        found: list[tuple[int, int]] = []
        for index, place in enumerate(chosen):
            if place is None:
                continue
            before = chosen[index - 1] if index else None
            if before is not None and self.follows(before, place):
                found[-1] = (found[-1][0], index + 1)
            else:
                found.append((index, index + 1))
        return found

    def allowed(self, chosen: list[int | None]) -> bool:
        for first, end in self.pieces(chosen):
            length = end - first
            row = [place for place in chosen[first:end] if place is not None]
            if first == 0 and self.before[1] and self.follows(self.before[0], row[0]):
                length += self.before[1]
            if end == len(chosen) and self.after[1] and self.follows(row[-1], self.after[0]):
                length += self.after[1]
            if length < self.threshold and not all(place in self.free for place in row):
                return False
        return True

    def score(self, chosen: list[int | None]) -> tuple[int, int, int]:
        pieces = self.pieces(chosen)
        return (
            sum(place is not None for place in chosen),
            -len(pieces),
            sum((end - first) ** 2 for first, end in pieces),
        )

    def best(self) -> tuple[int, int, int]:
        choices = product(*([None, *places] for places in self.places))
        return max(self.score(list(chosen)) for chosen in choices if self.allowed(list(chosen)))


@st.composite
def runs(draw: st.DrawFn) -> Run:
    """Places close together, so that sequences, tracks' ends and several copies meet often."""
    places = st.lists(st.integers(1, 14), max_size=3, unique=True)
    count = draw(st.integers(1, 6))
    neighbour = st.tuples(st.integers(1, 14), st.integers(0, 3))
    return Run(
        draw(st.lists(places, min_size=count, max_size=count)),
        draw(st.integers(1, 5)),
        draw(st.integers(1, 9)),
        draw(st.frozensets(st.integers(1, 14), max_size=3)),
        draw(neighbour),
        draw(neighbour),
    )


@settings(max_examples=1500, deadline=None)
@given(runs())
def test_no_other_choice_is_better(run: Run) -> None:
    chosen = run.match()
    assert run.allowed(chosen)
    assert run.score(chosen) == run.best()


@settings(max_examples=500, deadline=None)
@given(runs())
def test_the_open_tail_is_the_longest_row_that_goes_on(run: Run) -> None:
    chosen, count = run.match(), len(run.places)
    tails = [0]
    for first in range(count):
        for place in run.places[first]:
            row = [place + index for index in range(count - first + 1)]
            if (
                all(value is None for value in chosen[first:])
                and all(place in run.places[first + index] for index, place in enumerate(row[:-1]))
                and all(run.follows(one, two) for one, two in pairwise(row))
            ):
                tails.append(count - first)
    assert run.open_tail() == max(tails)


def test_a_run_shorter_than_the_threshold_is_written() -> None:
    assert Run([[10], [11], [12]], 4).match() == [None] * 3
    assert Run([[10], [11], [12], [13]], 4).match() == [10, 11, 12, 13]
    assert Run([[10], [11], [], [13], [14]], 3).match() == [None] * 5


def test_the_longest_match_wins() -> None:
    assert Run([[10, 30], [11, 31], [12], [13]], 2).match() == [10, 11, 12, 13]
    assert Run([[30, 10], [31, 11], [12]], 1).match() == [10, 11, 12]


def test_a_run_goes_on_at_the_right_one_of_several_copies() -> None:
    assert Run([[50], [7, 51, 90], [52, 8]], 2).match() == [50, 51, 52]


def test_a_track_ends() -> None:
    assert Run([[62], [63], [64], [65]], 3).match() == [None] * 4
    assert Run([[62], [63], [64], [65]], 2).match() == [62, 63, 64, 65]
    assert Run([[62], [63], [64], [65]], 3, track=128).match() == [62, 63, 64, 65]


def test_what_stands_beside_the_run_counts() -> None:
    assert Run([[12]], 4, before=(11, 3)).match() == [12]
    assert Run([[12]], 4, before=(11, 2)).match() == [None]
    assert Run([[12]], 4, before=(11, 2), after=(13, 1)).match() == [12]
    assert Run([[64]], 2, before=(63, 1)).match() == [None]


def test_a_free_place_needs_no_sequence() -> None:
    assert Run([[12], [99], [14]], 4, free=frozenset({99})).match() == [None, 99, None]


def test_of_equal_choices_the_one_in_sequence_is_taken() -> None:
    """Across a track's end: two pieces either way."""
    assert Run([[62], [63], [200, 64], [201, 65]], 2).match() == [62, 63, 64, 65]


@pytest.mark.parametrize("places", [1, 8])
def test_a_whole_run_of_one_content(places: int) -> None:
    run = Run([[100 + index for index in range(places)] for _ in range(128)], 2, track=1 << 20)
    chosen = run.match()
    assert run.allowed(chosen)
    assert sum(place is not None for place in chosen) == (128 if places > 1 else 0)
