"""The generator of duplicates: histograms, runs and distances as asked for; the fit finds what made a histogram."""

import zlib
from pathlib import Path

import numpy as np
import pytest

from atoll.bench import fit_duplicates
from atoll.bench.duplicates import BLOCK, BODY_MOST, IDEDUP_RUNS, PROFILES, Profile, Runs, Stream, contents

# What the fitted data sets save, by their histograms.
SAVINGS = {"archival": 0.0657, "personalfiles": 0.1721, "kernels": 0.6090}


def everything(stream: Stream) -> np.ndarray:
    return np.concatenate(list(stream))


def gaps(ids: np.ndarray) -> np.ndarray:
    """Blocks between each copy and the one before."""
    order = np.argsort(ids, kind="stable")
    return np.diff(order)[ids[order][1:] == ids[order][:-1]]


@pytest.mark.parametrize("name", SAVINGS)
@pytest.mark.parametrize("distance", ["near", "far"])
def test_a_stream_saves_what_its_data_set_saves(name: str, distance: str) -> None:
    stream = Stream(PROFILES[name], 200_000, IDEDUP_RUNS, distance)
    ids = everything(stream)
    assert len(ids) == stream.blocks and abs(stream.blocks - 200_000) < 2000
    assert len(np.unique(ids)) == stream.distinct
    assert abs(stream.possible - SAVINGS[name]) < 0.01
    assert abs(PROFILES[name].savings - SAVINGS[name]) < 0.001


@pytest.mark.parametrize("name", SAVINGS)
def test_a_stream_has_the_histogram_of_its_profile(name: str) -> None:
    profile = PROFILES[name]
    _, copies = np.unique(everything(Stream(profile, 300_000)), return_counts=True)
    found = np.bincount(copies - 1, minlength=BODY_MOST + 1)[: BODY_MOST + 1].astype(float)
    expected = profile.body()
    assert np.abs(np.cumsum(found / found.sum()) - np.cumsum(expected)).max() < 0.001
    if profile.hot > 0.01:
        assert abs(copies.max() / 300_000 - profile.hot_shares()[0]) < 0.0001


def test_near_copies_are_near_and_far_ones_far() -> None:
    size = 200_000
    for distance, least, most in (
        ("near", 0, size // 512 * 2),
        ("far", size // 2 - 1200, size // 2 + 1200),
        (50_000, 48_000, 52_000),
    ):
        found = gaps(everything(Stream(PROFILES["half"], size, Runs(4.0), distance)))
        assert len(found) > 0.49 * size
        around = found if distance != 50_000 else np.minimum(found, size - found)  # counted around the end
        assert least <= around.min() and around.max() <= most


def test_runs_have_the_lengths_asked_for() -> None:
    """In a stream of far copies a run is what is repeated as a whole."""
    ids = everything(Stream(PROFILES["half"], 200_000, IDEDUP_RUNS))
    order = np.argsort(ids, kind="stable")
    partner = np.empty(len(ids), np.int64)
    partner[order[0::2]], partner[order[1::2]] = order[1::2], order[0::2]
    starts = np.flatnonzero(np.diff(partner, prepend=-5) != 1)
    lengths = np.diff(starts, append=len(ids))
    assert abs(lengths[lengths > 1].mean() - 1 - 6) < 0.3  # geometric: those over 1 have the mean and one more
    forgone = [lengths[lengths < threshold].sum() / len(ids) for threshold in (2, 4, 8)]
    assert 0.18 <= forgone[0] <= 0.24 and 0.25 <= forgone[1] <= 0.33 and 0.50 <= forgone[2] + 0.01 <= 0.54, forgone


def test_seeds_make_streams_that_share_nothing() -> None:
    first, again, other = (Stream(PROFILES["kernels"], 20_000, IDEDUP_RUNS, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(everything(first), everything(again))
    assert not np.isin(everything(first), everything(other)).any()
    assert np.array_equal(first[7], list(first)[7])


def test_batches_are_the_stream_in_pieces() -> None:
    stream = Stream(PROFILES["personalfiles"], 10_000, Runs(3.0))
    batches = list(stream.batches(100))
    assert {len(batch) for batch in batches[:-1]} == {100} and 0 < len(batches[-1]) <= 100
    assert np.array_equal(np.concatenate(batches), everything(stream))


def test_contents_cannot_be_compressed_and_tell_their_id() -> None:
    ids = everything(Stream(PROFILES["unique"], 64))
    blocks = contents(ids)
    assert blocks.nbytes == len(ids) * BLOCK and np.array_equal(blocks[:, 0], ids)
    assert len(zlib.compress(blocks.tobytes())) > 0.98 * blocks.nbytes
    assert len({block.tobytes() for block in blocks}) == len(ids)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Stream(PROFILES["half"], 0), "0 blocks"),
        (lambda: Stream(PROFILES["half"], 100, distance="close"), "'close'"),
        (lambda: Runs(0.5), "0.5"),
        (lambda: Runs(1000.0), "1000.0"),
        (lambda: Profile("x", unique=1.5, exponent=1.0), "1.5"),
    ],
)
def test_what_cannot_be_is_refused(make: object, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("name", SAVINGS)
def test_a_fit_finds_what_made_the_histogram(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile, file = PROFILES[name], tmp_path / "histogram.txt"
    contents_count = 5_000_000
    lines = [f"{number} {round(share * contents_count)}" for number, share in enumerate(profile.body())]
    blocks = sum((number + 1) * round(share * contents_count) for number, share in enumerate(profile.body()))
    lines += [
        f"{round(share * blocks / (1 - profile.hot)) - 1} 1" for share in profile.hot_shares() if share * blocks > 66
    ]
    file.write_text("\n".join(lines) + "\n")
    found = fit_duplicates.fit(name, fit_duplicates.read_histogram(file))
    assert abs(found.savings - profile.savings) < 0.001 and abs(found.profile.savings - profile.savings) < 0.001
    assert abs(found.profile.exponent - profile.exponent) < 0.05 and found.difference < 0.001
    assert fit_duplicates.main([str(file)]) == 0
    assert f"exponent={found.profile.exponent:.3f}" in capsys.readouterr().out


def test_a_line_that_is_no_histogram_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "histogram.txt"
    file.write_text("0 7\n1 many\n")
    assert fit_duplicates.main([str(file)]) == 1
    assert "histogram.txt:2: not two counts: '1 many'" in capsys.readouterr().err
