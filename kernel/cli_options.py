"""What the commands of `atoll` have in common: exit statuses, options, kinds of parameters, and JSON.

A value that a configuration file may hold too is checked by the same function as there (config.py).
"""

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from atoll.kernel import config as configuration

EXIT_NEGATIVE = 1
EXIT_USAGE = 2
EXIT_SERVER = 3
EXIT_REFUSED = 4
EXIT_NO_ANSWER = 5
EXIT_INTERRUPTED = 128 + signal.SIGINT  # as a shell says it

PICTURES = (".png", ".svg", ".pdf")

F = TypeVar("F", bound=Callable[..., Any])


class Checked(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """A parameter that `check` makes of its text, or refuses by raising ConfigError."""

    def __init__(self, name: str, check: Callable[[str], Any]) -> None:
        self.name = name
        self.check = check

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self.check(value)
        except configuration.ConfigError as error:
            self.fail(str(error), param, ctx)


class FilePath(click.Path):
    """A path, which "" is none of: it would be the current directory."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        if not os.fspath(value):
            self.fail(f"expected a path, got {value!r}", param, ctx)
        return super().convert(value, param, ctx)


class Number(click.FloatRange):
    """A number, which "nan" is none of, up to `most`."""

    def __init__(self, least: float, most: float | None = None) -> None:
        super().__init__(least, most)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value!r} is no number", param, ctx)
        return found


def seconds(least: float, most: float = configuration.TIME_S_MAX) -> Number:
    return Number(least, most)


def parse_signal(text: str) -> signal.Signals:
    """KILL, SIGKILL or 9."""
    try:
        if text.isdigit():
            return signal.Signals(int(text))
        return signal.Signals["SIG" + text.upper().removeprefix("SIG")]
    except (KeyError, ValueError):
        raise configuration.ConfigError(f"no such signal: {text!r}") from None


def parse_signals(text: str) -> tuple[signal.Signals, ...]:
    return tuple(parse_signal(name.strip()) for name in text.split(","))


def check_picture(text: str) -> str:
    """It is drawn when all is measured: too late to say that there is no place for it."""
    if Path(text).is_dir() or not Path(text).absolute().parent.is_dir():
        raise configuration.ConfigError(f"{text!r} cannot be written: no file in a directory that is there")
    if Path(text).suffix not in PICTURES:
        raise configuration.ConfigError(f"the name of a picture ends in {', '.join(PICTURES)}, not as {text!r} does")
    return text


PATH = FilePath()
SIZE = Checked("size", configuration.parse_size)
VOLUME = Checked("volume", configuration.parse_volume)
VOLUME_NAME = Checked("name", configuration.check_volume_name)
PICTURE = Checked("file", check_picture)
SIGNAL = Checked("signal", parse_signal)
SIGNALS = Checked("signals", parse_signals)
THRESHOLD = click.IntRange(1, configuration.THRESHOLD_MAX)
TIER_THRESHOLD = click.IntRange(1, configuration.TIER_THRESHOLD_MAX)


def data_option(command: F) -> F:
    return click.option(
        "--data",
        metavar="DIR",
        envvar="ATOLL_DATA",
        default=f"./{configuration.DEFAULT_DATA}",
        show_default=True,
        show_envvar=True,
        type=PATH,
        help="Data directory of the server.",
    )(command)


def json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")(command)


def plot_option(what: str) -> Callable[[F], F]:
    return click.option("--plot", metavar="FILE.png", type=PICTURE, help=what)


def end_in_order() -> None:
    """SIGTERM ends the command as Ctrl-C does, so that nothing that it has started is left behind."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def emit(document: Any) -> None:
    """JSON for programs, indented for people who look at it anyway."""
    text = json.dumps(document, indent=2, ensure_ascii=False, default=str)
    click.echo(text.encode(errors="backslashreplace").decode())  # file names need not be UTF-8; \udcff is JSON, too
