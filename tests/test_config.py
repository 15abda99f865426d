"""Configuration: what is right is read exactly, what is wrong is named with file, path and value."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.bench.server import toml
from atoll.ipc._ipc import lib
from atoll.kernel import config
from atoll.kernel.config import ConfigError


def test_limits_are_those_of_the_header() -> None:
    assert config.CONNECTION_COUNT == lib.ATOLL_CONNECTION_COUNT
    assert config.SLOT_COUNT == lib.ATOLL_SLOT_COUNT
    assert config.PART_BYTES == lib.ATOLL_PART_BYTES
    assert config.VOLUME_COUNT == lib.ATOLL_VOLUME_COUNT
    assert lib.ATOLL_VOLUME_NAME_BYTES > config.VOLUME_NAME_BYTES
    assert config.THRESHOLD_MAX == lib.ATOLL_THRESHOLD_MAX
    assert config.TIER_THRESHOLD_MAX == lib.ATOLL_TIER_THRESHOLD_MAX


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 << 30), ("8G", 8 << 30), ("8g", 8 << 30), ("512M", 512 << 20), ("1.5K", 1536), ("4096", 4096),
        (4096, 4096), ("1 TiB", 1 << 40), ("2TB", 2 << 40), ("0", 0), ("12b", 12), ("7E", 7 << 60),
    ],
)  # fmt: skip
def test_sizes(text: str | int, size: int) -> None:
    assert config.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", -1, "1.5", "8Gi B", "1e9", "8 G i B", "9E", "0x10", True, "1.0001K"])
def test_sizes_that_are_none(text: Any) -> None:
    with pytest.raises(ConfigError, match="expected a size"):
        config.parse_size(text)


@given(st.integers(0, (1 << 63) - 1))
def test_a_size_is_read_as_it_was_written(size: int) -> None:
    assert config.parse_size(config.format_size(size)) == size


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    try:
        assert 0 <= config.parse_size(text) < 1 << 63
    except ConfigError as error:
        assert repr(text) in str(error)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("127.0.0.1:10809", ("127.0.0.1", 10809)), ("[::1]:0", ("::1", 0)), (":5", ("", 5)),
        ("storage.example:65535", ("storage.example", 65535)), ("[fe80::1%eth0]:1", ("fe80::1%eth0", 1)),
    ],
)  # fmt: skip
def test_listen_addresses(text: str, parsed: tuple[str, int]) -> None:
    assert config.parse_listen(text) == parsed


@pytest.mark.parametrize("text", ["", "host", "host:", "::1:5", "host:65536", "host:x", "[::1]", "[host]:5", "a b:5"])
def test_listen_addresses_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError):
        config.parse_listen(text)


@pytest.mark.parametrize("name", ["disk", "pool/mail", "a=b", "Wäsche", "x" * 255, " "])
def test_volume_names(name: str) -> None:
    assert config.check_volume_name(name) == name


@pytest.mark.parametrize("name", ["", "x" * 256, "ä" * 128, "a\nb", "\0", "\x7f", "/x", "\udc80"])
def test_volume_names_that_are_none(name: str) -> None:
    with pytest.raises(ConfigError):
        config.check_volume_name(name)


def read(tmp_path: Path, text: str, **options: Any) -> dict[str, Any]:
    file = tmp_path / "atoll.toml"
    file.write_text(text)
    return config.load(file, options).as_dict()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[nic]\nbuffer_bytes = "x"',
            "nic.buffer_bytes: expected a size such as \"8GiB\" or a number of bytes, got 'x'",
        ),
        ("[nic]\nbufer_bytes = 1", "nic.bufer_bytes: unknown key, did you mean 'buffer_bytes'?"),
        ("zzz = 1", "zzz: unknown key; known: data, listen,"),
        ("[nic]\nengine = 'x'", "nic.engine: expected one of 'auto', 'io_uring', 'sockets', got 'x'"),
        ("[nic]\nmax_connections = 5000", "nic.max_connections: expected a whole number <= 2047, got 5000"),
        ("[kernel]\nhang_s = 0", "kernel.hang_s: expected a number >= 0.01, got 0"),
        ("[kernel]\nhang_s = 1e-300", "kernel.hang_s: expected a number >= 0.01, got 1e-300"),
        ("[kernel]\nhang_s = nan", "kernel.hang_s: expected a number >= 0.01, got nan"),
        ("[nic]\nreply_timeout_s = 1e-10", "nic.reply_timeout_s: expected a number >= 0.001, got 1e-10"),
        ("[kernel]\nhang_s = inf", "kernel.hang_s: expected a number <="),
        ("[kernel]\nplacement = 'x'", "kernel.placement: expected one of 'auto', 'together', 'none', got 'x'"),
        ("[kernel]\ncpu_latency_us = -2", "kernel.cpu_latency_us: expected a whole number >= -1, got -2"),
        ("[kernel]\ncpus = [1, -1]", "kernel.cpus[1]: expected a whole number >= 0, got -1"),
        ("listen = 'a:1'", "listen: expected a list, got a text"),
        ("listen = ['a:1', 5]", "listen[1]: expected a text, got a whole number"),
        ("listen = ['a:1', 'b']", "listen[1]: expected HOST:PORT"),
        ("listen = ['a:1', 'a:1']", "listen: 'a:1' is named twice"),
        ("sparse = 1", "sparse: expected true or false, got a whole number"),
        ("nic = 1", "nic: expected a table, got a whole number"),
        ("volumes = [{name = 'a', size = '1G'}, {name = 'b', size = 'q'}]", "volumes[1].size: expected a size"),
        ("volumes = [{name = 'a'}]", "volumes[0]: key 'size' is missing"),
        ("volumes = [{name = 'a', size = 5}]", "volumes[0]: a volume's size is a multiple of 512"),
        ("volumes = [{name = '', size = 512}]", "volumes[0]: a volume name has 1 to 255 bytes"),
        ("volumes = [{name = 'a', size = 512}, {name = 'a', size = 512}]", "volumes[1]: volume 'a' is named twice"),
        ("device_size = '1M'", "device_size: at least 128MiB, got 1MiB"),
        ("device_size = 1073741825", "device_size: a multiple of 4096, got 1073741825"),
        (
            "device_size = '1G'\n[dedup]\nmetadata_log_bytes = '200M'",
            "dedup.metadata_log_bytes: 200MiB (kept twice) is more",
        ),
        ("[dedup]\ntrack_bytes = '128K'", "dedup.track_bytes: 0, or a multiple of 4096 from 256KiB to 64MiB, got 128"),
        ("fast_device_size = '1G'", "fast_device_size: without a fast_device it means nothing"),
        ("fast_device = 'f'\nfast_device_size = 4096", "fast_device_size: a multiple of 4096, at least 1MiB, got 4KiB"),
        ("device = 'd'\nfast_device = './d'", "fast_device: "),
        ("data = 'x'\nfast_device = 'x/device.img'", "fast_device: "),
        ("[llrrm]\ncache_bytes = 4096", "llrrm.cache_bytes: at least 1MiB, got 4KiB"),
        ("volumes = [{name = 'a', size = 512, threshold = 0}]", "volumes[0].threshold: expected a whole number >= 1"),
        ("volumes = [{name = 'a', size = 512, threshold = 65}]", "volumes[0].threshold: expected a whole number <= 64"),
        ("[nic]\nbuffer_bytes = '1M'", "nic.buffer_bytes: at least 4MiB, got 1MiB"),
        (f"unix = ['/{'x' * 107}']", "unix[0]: a socket's path has at most 107 bytes"),
        ("x = ?", "Invalid value (at line 1, column 5)"),
        (f"device_size = {'9' * 5000}", "a number in it has thousands of digits"),
        (f"device_size = '{'9' * 5000}'", "device_size: expected a size such as"),
        (f"device_size = '{'9' * 400}.5G'", "device_size: expected a size such as"),
        ("data = ''", "data: expected a path, got ''"),
        ("data = 'd'\ndevice = ''", "device: expected a path, got ''"),
        ("fast_device = 'x\\u0000y'".replace("'", '"'), "fast_device: expected a path, got 'x\\x00y'"),
        ("unix = ['s', '']", "unix[1]: expected a path, got ''"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read(tmp_path, text)
    assert str(raised.value).startswith(f"{tmp_path}/atoll.toml: {message}")
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.toml: No such file"):
        config.load(tmp_path / "none.toml")


def test_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain = config.load().as_dict()
    assert plain["data"] == str(tmp_path / "atoll-data")
    assert plain["listen"] == ["127.0.0.1:10809"]
    assert plain["unix"] == [str(tmp_path / "atoll-data/nbd.sock")]
    assert plain["device"] == str(tmp_path / "atoll-data/device.img")
    assert plain["device_bytes"] == 8 << 30
    rules = {"read_only": False, "threshold": 0, "tier_threshold": 0}
    assert plain["volumes"] == [{"name": "disk", "size_bytes": 8 << 30, **rules, "if_none": True}]
    assert plain["nic"]["buffer_bytes"] == 192 << 20
    assert plain["testing"] == {"crash_points": False, "modules": {}, "fault": {}}


def test_handed_over_sockets_take_the_place_of_the_default_ones() -> None:
    assert config.load().as_dict(socket_activated=True)["listen"] == []
    given = config.load(options={"listen": ["127.0.0.1:1"]}).as_dict(socket_activated=True)
    assert given["listen"] == ["127.0.0.1:1"]


def test_options_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    plain = read(
        tmp_path,
        "data = 'd'\nlisten = ['a:1']\n"
        "volumes = [{name = 'a', size = '1G'}, {name = 'b', size = '2G', read_only = true}]",
        listen=["b:2", "c:3"],
        unix=["s"],
        volumes=[config.parse_volume("a=4G"), config.parse_volume("c=8G,ro")],
        device=None,
        device_size="1GiB",
        sparse=True,
    )
    assert plain["data"] == str(tmp_path / "d")  # of the file: beside it
    assert plain["unix"] == [str(tmp_path / "elsewhere/s")]  # of an option: where it was given
    assert plain["listen"] == ["b:2", "c:3"]
    assert {v["name"]: (v["size_bytes"], v["read_only"]) for v in plain["volumes"]} == {
        "a": (4 << 30, False),
        "b": (2 << 30, True),
        "c": (8 << 30, True),
    }
    assert plain["device_bytes"] == 1 << 30
    assert plain["sparse"] is True


@pytest.mark.parametrize("text", ["a", "a=1G,x", "=", "a=1G,ro,ro"])
def test_wrong_volume_options(text: str) -> None:
    with pytest.raises(ConfigError):
        config.load(options={"volumes": [config.parse_volume(text)]})


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["nic", "name", "size", "x"]), inner)
        ),
        max_leaves=4,
    ),
    st.sampled_from(["listen", "volumes", "nic", "device_size", "testing", "nope", "data"]),
)
def test_no_value_whatever_ends_in_a_traceback(value: Any, key: str) -> None:
    try:
        config.load(options={key: value}).as_dict()
    except ConfigError as error:
        assert str(error)


def test_what_tests_write_is_toml() -> None:
    table = {"a": 1, "b": {"c": [True, "x"]}, "d": [{"name": "y", "size": 5}]}
    assert tomllib.loads(toml(table)) == table
