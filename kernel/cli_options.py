"""What the commands of `atoll` have in common: exit statuses, options, kinds of parameters, and JSON.

A value that a configuration file may hold too is checked by the same function as there (config.py).
"""

import json
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


SIZE = Checked("size", configuration.parse_size)
VOLUME = Checked("volume", configuration.parse_volume)
VOLUME_NAME = Checked("name", configuration.check_volume_name)
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
        type=click.Path(path_type=Path),
        help="Data directory of the server.",
    )(command)


def json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")(command)


def plot_option(what: str) -> Callable[[F], F]:
    return click.option("--plot", metavar="FILE.png", type=click.Path(dir_okay=False), help=what)


def emit(document: Any) -> None:
    """JSON for programs, indented for people who look at it anyway."""
    text = json.dumps(document, indent=2, ensure_ascii=False, default=str)
    click.echo(text.encode(errors="backslashreplace").decode())  # file names need not be UTF-8; \udcff is JSON, too
