"""The configuration of a server: a TOML file and command-line options, checked, as plain data.

- `load(file, options)`   reads and merges both (options win), checks everything, returns a `Config`
- `Config.as_dict()`      what `init.run`, domains' `plan()` and `context.config` receive: bytes, absolute paths
- `parse_size`, `parse_listen`, `check_volume_name`   the same rules for the command line

Whatever is wrong raises `ConfigError`, one line with the file, the path of the key and the value met:
`atoll.toml: nic.buffer_bytes: expected a size such as "8GiB" or a number of bytes, got 'x'`.

A file may say (all of it is optional):

    data = "atoll-data"                # relative to the file; of options: to the current directory
    listen = ["127.0.0.1:10809", "[::1]:10809"]
    unix = ["/run/atoll/nbd.sock"]
    device = "/dev/nvme1n1"            # file or block device; default DATA/device.img
    device_size = "8GiB"               # of a file that is to be made
    sparse = false                     # true: not preallocated, for trials
    fast_device = "/dev/nvme2n1"       # file or block device for the fast tier; default: none
    fast_device_size = "16GiB"         # of a file that is to be made
    volumes = [{name = "disk", size = "8GiB", read_only = false, threshold = 1, tier_threshold = 8}]
    [nic] [nbd] [dedup] [disk] [llrrm] [kernel] [testing]   # see the classes below
"""

import difflib
import os
import re
import tomllib
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct, field

DEFAULT_DATA = "atoll-data"
DEFAULT_LISTEN = "127.0.0.1:10809"
DEFAULT_UNIX = "nbd.sock"  # in the data directory
DEFAULT_DEVICE = "device.img"  # in the data directory

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

# Limits that ipc/limits.h sets (tests/test_config.py compares).
CONNECTION_COUNT = 2048
SLOT_COUNT = 2048
PART_BYTES = 256 * KIB
VOLUME_COUNT = 256
VOLUME_NAME_BYTES = 255
THRESHOLD_MAX = 64
TIER_THRESHOLD_MAX = 1_000_000

# A device must hold superblocks, the metadata log twice, metadata and some data.
DEVICE_BYTES_MIN = 128 * MIB
# A fast device must hold its superblock, its table and some blocks.
FAST_DEVICE_BYTES_MIN = 1 * MIB
CPU_MAX = 8191  # as far as Linux counts
# A year: no timeout makes sense beyond, and it fits every clock. Less than a millisecond is over before anybody is
# looked at.
TIME_S_MIN, TIME_S_MAX = 0.001, 365 * 86400
# Who is given no more than some turns of a processor is killed whenever another has it.
HANG_S_MIN = 0.01
# No processor takes longer to wake up.
CPU_LATENCY_US_MAX = 100_000
# A run of the largest threshold must find room on one track; beyond a track is no single seek any more.
TRACK_BYTES_MIN, TRACK_BYTES_MAX = 256 * KIB, 64 * MIB
# What a block map's signed 64-bit arithmetic and every client can address.
VOLUME_BYTES_MAX = 1 << 60
# More says nothing more of less than 2^63 bytes.
SIZE_TEXT_MAX = 64
# sockaddr_un.sun_path with its terminator.
UNIX_PATH_BYTES = 107


class ConfigError(Exception):
    """One line: where, what was expected, what was met."""


class Size(int):
    """Bytes; in a file or an option a number or a text such as "512M" or "8GiB"."""


# Not empty, and what the operating system can take.
FilePath = Annotated[str, Meta(pattern=r"^[^\0]+$")]


class Nic(Struct, forbid_unknown_fields=True, kw_only=True):
    max_connections: Annotated[int, Meta(ge=1, le=CONNECTION_COUNT - 1)] = 1500
    requests_per_connection: Annotated[int, Meta(ge=1, le=SLOT_COUNT // 2)] = 64
    buffer_bytes: Size = Size(192 * MIB)
    engine: Literal["auto", "io_uring", "sockets"] = "auto"
    courtesy: bool = True  # a client on nic's processor is not interrupted while it sends
    handshake_timeout_s: Annotated[float, Meta(ge=TIME_S_MIN, le=TIME_S_MAX)] = 10.0
    payload_timeout_s: Annotated[float, Meta(ge=TIME_S_MIN, le=TIME_S_MAX)] = 30.0
    reply_timeout_s: Annotated[float, Meta(ge=TIME_S_MIN, le=TIME_S_MAX)] = 60.0
    idle_timeout_s: Annotated[float, Meta(ge=0, le=TIME_S_MAX)] = 0.0  # 0: none
    crowded_timeout_s: Annotated[float, Meta(ge=TIME_S_MIN, le=TIME_S_MAX)] = 10.0


class Nbd(Struct, forbid_unknown_fields=True, kw_only=True):
    pass


class Dedup(Struct, forbid_unknown_fields=True, kw_only=True):
    merge_buffer_bytes: Size = Size(16 * MIB)
    fingerprint_entries: Annotated[int, Meta(ge=1024, le=1 << 32)] = 1048576
    destage_delay_ms: Annotated[int, Meta(ge=0, le=60000)] = 100
    metadata_log_bytes: Size = Size(16 * MIB)
    metadata_cache_bytes: Size = Size(64 * MIB)  # pages of map, counts and fingerprints in memory
    posted_blocks: Annotated[int, Meta(ge=0, le=256)] = 256  # answered before dedup has applied them, at most; 0: none
    tier_entries: Annotated[int, Meta(ge=64, le=1 << 28)] = 1048576  # blocks on the fast device at most; 41 bytes each
    track_bytes: Size = Size(0)  # what the main device reads without a seek; 0: as the device says


class Disk(Struct, forbid_unknown_fields=True, kw_only=True):
    cache_bytes: Size = Size(64 * MIB)
    engine: Literal["auto", "io_uring", "threads"] = "auto"
    pin_arenas: bool = True  # what is written lies in memory that is pinned once, not for each write


class Llrrm(Struct, forbid_unknown_fields=True, kw_only=True):
    """The driver of the fast device; only where there is one."""

    cache_bytes: Size = Size(16 * MIB)
    engine: Literal["auto", "io_uring", "threads"] = "auto"
    pin_arenas: bool = True


class Kernel(Struct, forbid_unknown_fields=True, kw_only=True):
    hang_s: Annotated[float, Meta(ge=HANG_S_MIN, le=TIME_S_MAX)] = 1.0
    restart_backoff_s: Annotated[float, Meta(ge=0, le=TIME_S_MAX)] = 5.0
    placement: Literal["auto", "together", "none"] = "auto"  # of the data path's domains: on one processor, or anywhere
    spin_us: Annotated[int, Meta(ge=0, le=1000)] = 50  # what a domain looks around for more work before it sleeps
    cpu_latency_us: Annotated[int, Meta(ge=-1, le=CPU_LATENCY_US_MAX)] = 0  # of idle processors under load; -1: any
    cpus: list[Annotated[int, Meta(ge=0, le=CPU_MAX)]] = field(default_factory=list)  # to be used; none: all allowed


class Testing(Struct, forbid_unknown_fields=True, kw_only=True):
    crash_points: bool = False
    modules: dict[str, str] = field(default_factory=dict)  # role: module that takes the real one's place
    fault: dict[str, Any] = field(default_factory=dict)


class Volume(Struct, forbid_unknown_fields=True, kw_only=True):
    name: str
    size: Size
    read_only: bool = False
    threshold: Annotated[int, Meta(ge=1, le=THRESHOLD_MAX)] | None = None  # blocks in sequence (THN); none: 1
    tier_threshold: Annotated[int, Meta(ge=1, le=TIER_THRESHOLD_MAX)] | None = None  # references; none: 8

    def as_dict(self) -> dict[str, Any]:
        """0 stands for a threshold that is not said."""
        return {
            "name": self.name,
            "size_bytes": int(self.size),
            "read_only": self.read_only,
            "threshold": self.threshold or 0,
            "tier_threshold": self.tier_threshold or 0,
        }


class Config(Struct, forbid_unknown_fields=True, kw_only=True):
    data: FilePath | None = None
    listen: list[str] | None = None
    unix: list[FilePath] | None = None
    device: FilePath | None = None
    device_size: Size | None = None
    sparse: bool = False
    fast_device: FilePath | None = None
    fast_device_size: Size | None = None
    volumes: list[Volume] | None = None
    nic: Nic = field(default_factory=Nic)
    nbd: Nbd = field(default_factory=Nbd)
    dedup: Dedup = field(default_factory=Dedup)
    disk: Disk = field(default_factory=Disk)
    llrrm: Llrrm = field(default_factory=Llrrm)
    kernel: Kernel = field(default_factory=Kernel)
    testing: Testing = field(default_factory=Testing)

    def as_dict(self, socket_activated: bool = False) -> dict[str, Any]:
        """Plain data with the defaults filled in. A volume with `if_none` is made only where no volume exists at all.

        `device_bytes` is the size asked for (`device_size_given`: by the user); init replaces it by the device's own.
        `socket_activated`: sockets were handed over, so that none is opened by default.
        """
        data = Path(self.data or DEFAULT_DATA).absolute()
        listen, unix = self.listen, self.unix
        if listen is None and unix is None and not socket_activated:
            listen, unix = [DEFAULT_LISTEN], [str(data / DEFAULT_UNIX)]
        if self.volumes is None:
            volumes = [Volume(name="disk", size=Size(8 * GIB)).as_dict() | {"if_none": True}]
        else:
            volumes = [volume.as_dict() | {"if_none": False} for volume in self.volumes]
        plain = {
            "data": str(data),
            "listen": listen or [],
            "unix": unix or [],
            "device": self.device or str(data / DEFAULT_DEVICE),
            "device_bytes": 8 * GIB if self.device_size is None else int(self.device_size),
            "device_size_given": self.device_size is not None,
            "sparse": self.sparse,
            "fast_device": self.fast_device or "",
            "fast_device_bytes": int(self.fast_device_size or 0),
            "volumes": volumes,
        }
        for section in ("nic", "nbd", "dedup", "disk", "llrrm", "kernel", "testing"):
            plain[section] = {
                key: int(value) if isinstance(value, Size) else value
                for key, value in msgspec.structs.asdict(getattr(self, section)).items()
            }
        return plain


# --- Values ---------------------------------------------------------------------------------------------------------

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgtpe])(i?b)?|b)?", re.IGNORECASE)


def parse_size(text: str | int) -> Size:
    """`8GiB`, `8G` (the same: units are powers of 1,024), `1.5M`, `4096`. Raises ConfigError."""
    expected = f'expected a size such as "8GiB" or a number of bytes, got {shown(text)}'
    if isinstance(text, bool) or not isinstance(text, (str, int)):
        raise ConfigError(expected)
    if isinstance(text, int):
        value: float = text
    elif len(text) > SIZE_TEXT_MAX:  # Python makes no number of thousands of digits
        raise ConfigError(f"{expected} (at most {SIZE_TEXT_MAX} characters)")
    else:
        match = _SIZE.fullmatch(text.strip())
        if match is None:
            raise ConfigError(expected)
        number, unit = match[1], match[2]
        factor = 1 << (10 * (1 + "kmgtpe".index(unit.lower()))) if unit else 1
        value = float(number) * factor if "." in number else int(number) * factor
    if value < 0 or value != int(value) or value >= 1 << 63:
        raise ConfigError(f"{expected} (a whole number of bytes, 0 to 2^63 - 1)")
    return Size(int(value))


def shown(value: Any) -> str:
    """As Python writes it, as far as that is of use to who reads a line."""
    text = repr(value)
    return text if len(text) <= 2 * SIZE_TEXT_MAX else f"{text[:SIZE_TEXT_MAX]}… ({len(text)} characters)"


def format_size(size_bytes: int) -> str:
    """The shortest exact text that `parse_size` reads back."""
    for shift, unit in ((60, "EiB"), (50, "PiB"), (40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size_bytes and size_bytes % (1 << shift) == 0:
            return f"{size_bytes >> shift}{unit}"
    return str(size_bytes)


def parse_listen(text: str) -> tuple[str, int]:
    """`HOST:PORT`, `[IPV6]:PORT`, `:PORT` (all addresses: host is empty). Port 0: any free one. Raises ConfigError."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f.]*:[:0-9A-Fa-f.]*(?:%\w+)?)\]|([^\[\]:\s]*)):(\d{1,5})", text)
    if match is None or int(match[3]) > 65535:
        raise ConfigError(f"expected HOST:PORT or [IPV6]:PORT with a port of 0 to 65535, got {text!r}")
    return match[1] or match[2] or "", int(match[3])


def check_volume_name(name: str) -> str:
    """Names are 1 to 255 bytes of UTF-8 without control characters, and do not begin with '/', which NBD URIs drop.

    A '/' elsewhere is allowed ("pool/mail"): a volume's name is no file name anywhere. Raises ConfigError.
    """
    try:
        size = len(name.encode("utf-8"))
    except UnicodeEncodeError:
        raise ConfigError(f"volume name {name!r} is not UTF-8") from None
    if not 1 <= size <= VOLUME_NAME_BYTES:
        raise ConfigError(f"a volume name has 1 to {VOLUME_NAME_BYTES} bytes, this one has {size}")
    if any(unicodedata.category(character) == "Cc" for character in name):
        raise ConfigError(f"volume name {name!r} holds a control character")
    if name.startswith("/"):
        raise ConfigError(f"volume name {name!r} begins with '/', which NBD URIs drop")
    return name


def parse_volume(text: str) -> dict[str, Any]:
    """`NAME=SIZE`, `NAME=SIZE,ro`, as a table of the file has it. Raises ConfigError."""
    name, separator, rest = text.rpartition("=")
    size, _, flag = rest.partition(",")
    if not separator or flag not in ("", "ro"):
        raise ConfigError(f"expected NAME=SIZE or NAME=SIZE,ro, got {text!r}")
    return {"name": name, "size": size, "read_only": flag == "ro"}


# --- Reading --------------------------------------------------------------------------------------------------------


def load(file: str | os.PathLike[str] | None = None, options: Mapping[str, Any] | None = None) -> Config:
    """The merged and checked configuration.

    `options` has the keys of a file as far as the user named them (None or an empty list: not named); `volumes` of
    options are added to the file's and win by name, all else replaces the file's. Raises ConfigError.
    """
    config = Config()
    if file is not None:
        name = os.fspath(file)
        config = _convert(_read(name), name)
        _absolute(config, Path(name).absolute().parent)
        _check(config, name)
    given = {key: value for key, value in (options or {}).items() if value not in (None, [], ())}
    if given:
        from_options = _convert(given, "command line")
        _absolute(from_options, Path.cwd())
        volumes = {volume.name: volume for volume in (config.volumes or [])}
        for key in given:
            setattr(config, key, getattr(from_options, key))
        if from_options.volumes is not None:
            config.volumes = list((volumes | {volume.name: volume for volume in from_options.volumes}).values())
        _check(config, "command line" if file is None else f"{os.fspath(file)} with the command line")
    return config


def _read(name: str) -> dict[str, Any]:
    try:
        with open(name, "rb") as stream:
            return tomllib.load(stream)
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: not UTF-8 at byte {error.start}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: {error}") from None  # names line and column
    except ValueError:  # Python's bound for a number's text
        raise ConfigError(f"{name}: a number in it has thousands of digits") from None


def _hook(kind: type, value: Any) -> Any:
    if kind is Size:
        try:
            return parse_size(value)
        except ConfigError as error:
            raise ValueError(str(error)) from None
    raise NotImplementedError(kind)


_AT = re.compile(r"(?P<what>.*?)(?: - at `(?:key in )?\$\.?(?P<path>[^`]*)`)?", re.DOTALL)
_WORDS = {  # msgspec's words for those of the file
    " | null": "", "`": "", "array": "a list", "object": "a table", "float": "a number", "bool": "true or false",
    "int": "a whole number", "str": "a text",
}  # fmt: skip
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<key>.*)`")


def _convert(raw: Mapping[str, Any], source: str) -> Config:
    try:
        return msgspec.convert(dict(raw), Config, dec_hook=_hook)
    except msgspec.ValidationError as error:
        match = _AT.fullmatch(str(error))
        assert match is not None
        what, path = match["what"], match["path"] or ""
        unknown = _UNKNOWN.fullmatch(what)
        if unknown is not None:
            known = _keys_at(path)
            near = difflib.get_close_matches(unknown["key"], known, 1)
            path = f"{path}.{unknown['key']}" if path else unknown["key"]
            what = "unknown key" + (
                f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(known) or 'none'}"
            )
        elif what.startswith("Invalid enum value"):
            kinds = get_type_hints(_kind_at(path.rpartition(".")[0])).get(path.rpartition(".")[2])
            what = f"expected one of {', '.join(map(repr, get_args(kinds)))}, got {_value_at(raw, path)!r}"
        elif what.startswith("Object missing required field"):
            what = f"key {what.split('`')[1]!r} is missing"
        elif "matching regex" in what:  # FilePath's
            what = f"expected a path, got {_value_at(raw, path)!r}"
        elif "got" not in what:
            what = f"{what}, got {_value_at(raw, path)!r}"
        if what.startswith("Expected `"):
            for theirs, ours in _WORDS.items():
                what = what.replace(theirs, ours)
        what = what[0].lower() + what[1:]
        raise ConfigError(f"{source}: {path}: {what}" if path else f"{source}: {what}") from None


def _keys_at(path: str) -> list[str]:
    kind = _kind_at(path)
    return list(kind.__struct_fields__) if hasattr(kind, "__struct_fields__") else []


def _kind_at(path: str) -> Any:
    """The class of the table at `path`."""
    kind: Any = Config
    for part in re.findall(r"\w+", re.sub(r"\[\d+\]", "", path)):
        kind = get_type_hints(kind).get(part, Config)
        for inner in get_args(kind):
            if get_origin(inner) is list:
                kind = inner
        if get_origin(kind) is list:
            kind = get_args(kind)[0]
    return kind


def _value_at(raw: Any, path: str) -> Any:
    for part in re.findall(r"\w+", path):
        try:
            raw = raw[int(part)] if isinstance(raw, list) else raw[part]
        except (KeyError, IndexError, TypeError, ValueError):
            return None
    return raw


def _absolute(config: Config, base: Path) -> None:
    if config.data:
        config.data = str(base / config.data)
    if config.device:
        config.device = str(base / config.device)
    if config.fast_device:
        config.fast_device = str(base / config.fast_device)
    if config.unix is not None:
        config.unix = [str(base / path) for path in config.unix]


# --- Checks across keys ---------------------------------------------------------------------------------------------


def _check(config: Config, source: str) -> None:
    def refuse(path: str, what: str) -> None:
        raise ConfigError(f"{source}: {path}: {what}")

    for index, address in enumerate(config.listen or []):
        try:
            parse_listen(address)
        except ConfigError as error:
            refuse(f"listen[{index}]", str(error))
    for key in ("listen", "unix"):
        values = [value for value in getattr(config, key) or [] if not value.endswith(":0")]
        for index, value in enumerate(values):
            if value in values[:index]:
                refuse(key, f"{value!r} is named twice")
    for index, path in enumerate(config.unix or []):
        if len(os.fsencode(path)) > UNIX_PATH_BYTES:
            refuse(f"unix[{index}]", f"a socket's path has at most {UNIX_PATH_BYTES} bytes, got {path!r}")
    if config.unix is None and config.listen is None:
        path = str(Path(config.data or DEFAULT_DATA).absolute() / DEFAULT_UNIX)
        if len(os.fsencode(path)) > UNIX_PATH_BYTES:
            refuse(
                "data", f"{path!r} is too long for a socket (at most {UNIX_PATH_BYTES} bytes): name another with unix"
            )

    volumes = config.volumes or []
    if len(volumes) > VOLUME_COUNT:
        refuse("volumes", f"at most {VOLUME_COUNT}, got {len(volumes)}")
    for index, volume in enumerate(volumes):
        where = f"volumes[{index}]"
        try:
            check_volume_name(volume.name)
            check_volume_size(volume.size)
        except ConfigError as error:
            refuse(where, str(error))
        if any(volume.name == other.name for other in volumes[:index]):
            refuse(where, f"volume {volume.name!r} is named twice")

    device_bytes = 8 * GIB if config.device_size is None else int(config.device_size)
    if device_bytes < DEVICE_BYTES_MIN:
        refuse("device_size", f"at least {format_size(DEVICE_BYTES_MIN)}, got {format_size(device_bytes)}")
    if device_bytes % 4096:
        refuse("device_size", f"a multiple of 4096, got {device_bytes}")

    main_device = config.device or str(Path(config.data or DEFAULT_DATA).absolute() / DEFAULT_DEVICE)
    if config.fast_device is not None and os.path.normpath(config.fast_device) == os.path.normpath(main_device):
        refuse("fast_device", f"{config.fast_device!r} is the device itself")
    if config.fast_device_size is not None:
        fast = int(config.fast_device_size)
        if config.fast_device is None:
            refuse("fast_device_size", "without a fast_device it means nothing")
        if fast < FAST_DEVICE_BYTES_MIN or fast % 4096:
            least = format_size(FAST_DEVICE_BYTES_MIN)
            refuse("fast_device_size", f"a multiple of 4096, at least {least}, got {format_size(fast)}")

    for path, size, smallest in (
        ("nic.buffer_bytes", config.nic.buffer_bytes, 16 * PART_BYTES),
        ("dedup.merge_buffer_bytes", config.dedup.merge_buffer_bytes, 1 * MIB),
        ("dedup.metadata_log_bytes", config.dedup.metadata_log_bytes, 1 * MIB),
        ("disk.cache_bytes", config.disk.cache_bytes, 4 * MIB),
        ("llrrm.cache_bytes", config.llrrm.cache_bytes, 1 * MIB),
    ):
        if size < smallest:
            refuse(path, f"at least {format_size(smallest)}, got {format_size(size)}")
        if size % 4096:
            refuse(path, f"a multiple of 4096, got {size}")
    track = int(config.dedup.track_bytes)
    if track and not (TRACK_BYTES_MIN <= track <= TRACK_BYTES_MAX and track % 4096 == 0):
        bounds = f"{format_size(TRACK_BYTES_MIN)} to {format_size(TRACK_BYTES_MAX)}"
        refuse("dedup.track_bytes", f"0, or a multiple of 4096 from {bounds}, got {format_size(track)}")
    log = int(config.dedup.metadata_log_bytes)
    if config.device_size is not None and 2 * log > device_bytes // 4:
        refuse(
            "dedup.metadata_log_bytes",
            f"{format_size(log)} (kept twice) is more than a quarter of the device of {format_size(device_bytes)}",
        )


def check_volume_size(size_bytes: int) -> int:
    """A multiple of 512, 512 bytes to 1 EiB. Raises ConfigError."""
    if not 512 <= size_bytes <= VOLUME_BYTES_MAX or size_bytes % 512:
        most = format_size(VOLUME_BYTES_MAX)
        raise ConfigError(f"a volume's size is a multiple of 512, 512 to {most}, got {format_size(size_bytes)}")
    return size_bytes
