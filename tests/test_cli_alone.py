"""The command line where no server runs: usage, exit status, one-line errors."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner
from serverkit import ATOLL, wait_for

from atoll.kernel import cli, cli_options

ROOT = Path(__file__).resolve().parent.parent


def atoll(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ATOLL), *arguments],
        capture_output=True, text=True, timeout=60, cwd=cwd, env={**os.environ, **environment},
    )  # fmt: skip


def one_line(done: subprocess.CompletedProcess[str], status: int) -> str:
    assert done.returncode == status, (done.stdout, done.stderr)
    assert done.stderr.startswith("atoll: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


COMMANDS = [
    ("serve",), ("status",), ("ps",), ("kill",), ("stop",), ("trace",), ("audit",), ("volume", "create"),
    ("volume", "list"), ("volume", "resize"), ("volume", "delete"), ("bench", "ring"), ("config", "show"),
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_and_takes_a_data_directory(command: tuple[str, ...]) -> None:
    result = CliRunner().invoke(cli.cli, [*command, "--help"])
    assert result.exit_code == 0
    assert command == ("bench", "ring") or "--data" in result.output
    assert command in {("serve",), ("config", "show")} or "--json" in result.output


WRONG_VALUES = [
    (("volume", "create", "v", "8 parsecs"), "'8 parsecs'"),
    (("device", "grow", "8 parsecs"), "'8 parsecs'"),
    (("scrub", "--rate", "8 parsecs"), "'8 parsecs'"),
    (("chaos", "--size", "8 parsecs"), "'8 parsecs'"),
    (("bench", "dedup", "--size", "8 parsecs"), "'8 parsecs'"),
    (("bench", "dedup", "--distance", "off"), "'off'"),
    (("kill", "nic", "--signal", "HUG"), "'HUG'"),
    (("chaos", "--signal", "KILL,HUG"), "'HUG'"),
    (("volume", "set", "v", "--threshold", "65"), "65 is not in the range 1<=x<=64"),
    (("bench", "dedup", "--threshold", "65"), "65 is not in the range 1<=x<=64"),
    (("volume", "set", "v", "--tier-threshold", "0"), "0 is not in the range"),
    (("bench", "dedup", "--tier-threshold", "0"), "0 is not in the range"),
    (("volume", "create", "v", "9" * 5000), "got '99999"),
    (("volume", "create", "v", "9" * 400 + ".5"), "got '99999"),
    (("device", "grow", "9" * 400 + ".0E"), "got '99999"),
    (("ps", "--watch", "--interval", "nan"), "'nan' is no number"),
    (("stop", "--timeout", "nan"), "'nan' is no number"),
    (("stop", "--timeout", "inf"), "inf is not in the range"),
    (("trace", "--timeout", "1e300"), "1e+300 is not in the range"),
    (("check", "--live", "--timeout", "nan"), "'nan' is no number"),
    (("chaos", "--rate", "nan"), "'nan' is no number"),
    (("chaos", "--duration", "inf"), "inf is not in the range"),
    (("bench", "ring", "--seconds", "inf"), "inf is not in the range"),
    (("bench", "dedup", "--lone", "nan"), "'nan' is no number"),
    (("chaos", "--plot", "/nonexistent/picture.png"), "'/nonexistent/picture.png' cannot be written"),
    (("status", "--data", ""), "'--data' (env var: 'ATOLL_DATA'): expected a path, got ''"),
    (("serve", "--config", ""), "'--config': expected a path, got ''"),
    (("check", ""), "'[DIR]': expected a path, got ''"),
    (("du", "--data", ""), "'--data': expected a path, got ''"),
    (("device", "grow", "1G", "--device", ""), "'--device': expected a path, got ''"),
    (("bench", "ring", "--plot", "/"), "'/' cannot be written"),
    (("bench", "dedup", "--plot", "picture.txt"), "not as 'picture.txt' does"),
]


@pytest.mark.parametrize(("arguments", "named"), WRONG_VALUES, ids=[" ".join(each[0])[:60] for each in WRONG_VALUES])
def test_a_wrong_value_is_named(arguments: tuple[str, ...], named: str) -> None:
    result = CliRunner().invoke(cli.cli, arguments)
    assert result.exit_code == cli.EXIT_USAGE and named in result.output, result.output


def test_help_tells_the_exit_status() -> None:
    assert "3  no server runs on the data directory" in atoll("--help").stdout
    assert "3  no server runs on the data directory" in atoll("serve", "--help").stdout


def test_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert atoll("--version").stdout == f"atoll {project['version']}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("status",), ("ps",), ("ps", "--watch"), ("kill", "nic"), ("stop",), ("trace",), ("audit",), ("volume", "list"),
        ("volume", "create", "x", "1G"), ("volume", "delete", "x"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_no_server(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    line = one_line(atoll(*arguments, "--data", str(tmp_path / "none")), 3)
    assert str(tmp_path / "none") in line


def test_the_data_directory_may_come_from_the_environment(tmp_path: Path) -> None:
    assert str(tmp_path / "e") in one_line(atoll("status", ATOLL_DATA=str(tmp_path / "e")), 3)


def test_a_dead_servers_socket_is_no_server(tmp_path: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "control.sock"))
    one_line(atoll("status", "--data", str(tmp_path)), 3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nonsense",), "nonsense"),
        (("kill",), "ROLE"),
        (("kill", "nic", "--signal", "NOPE"), "no such signal: 'NOPE'"),
        (("kill", "nic", "--signal", "99"), "no such signal: '99'"),
        (("volume", "create", "x", "big"), "expected a size"),
        (("volume", "create", "x", "100"), "multiple of 512"),
        (("volume", "create", "a\tb", "1G"), "control character"),
        (("volume", "create", "x" * 256, "1G"), "1 to 255 bytes"),
        (("serve", "--listen", "nowhere"), "command line: listen[0]: expected HOST:PORT"),
        (("serve", "--volume", "x"), "expected NAME=SIZE"),
        (("serve", "--volume", "x=7"), "multiple of 512"),
        (("serve", "--device-size", "1M"), "at least 128MiB"),
        (("serve", "--config", "/nonexistent.toml"), "/nonexistent.toml: No such file"),
        (("ps", "--interval", "0"), "--interval"),
    ],
)
def test_wrong_usage(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    assert says in one_line(atoll(*arguments, "--data", str(tmp_path)), 2)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text("[nic]\nbuffer_bytes = 'x'\n")
    line = one_line(atoll("serve", "--config", "my.toml", cwd=tmp_path), 2)
    assert line.startswith("atoll: my.toml: nic.buffer_bytes: expected a size")
    assert not (tmp_path / "atoll-data").exists()


def test_config_show_prints_what_serve_would_use(tmp_path: Path) -> None:
    done = atoll("config", "show", "--data", str(tmp_path / "d"), "--volume", "x=1G", "--sparse")
    shown = json.loads(done.stdout)
    rules = {"read_only": False, "threshold": 0, "tier_threshold": 0}
    assert shown["volumes"] == [{"name": "x", "size_bytes": 1 << 30, **rules, "if_none": False}]
    assert shown["sparse"] is True
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("output", "status", "says"),
    [(">/dev/full", 1, "atoll: cannot write: No space left on device\n"), (">&-", 0, ""), ("| true", 0, "")],
)
@pytest.mark.parametrize("command", ["config show", "--help"])
def test_an_output_that_takes_nothing(tmp_path: Path, command: str, output: str, status: int, says: str) -> None:
    """A full disk, a closed descriptor, a reader that has gone: one line at most."""
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; (sleep 0.1; {ATOLL} {command}) {output}"],
        capture_output=True, text=True, timeout=60, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (status, says)


# Imported by Python at its start: as if Ctrl-C came at an exact place.
INTERRUPTED = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["AT"]:
            os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Finder())
if os.environ["AT"] == "fork":
    os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGINT))
"""


def interrupted(folder: Path, at: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "sitecustomize.py").write_text(INTERRUPTED)
    return atoll(*arguments, PYTHONPATH=str(folder), AT=at)


@pytest.mark.parametrize(
    ("at", "status"),
    [("atoll.kernel.cli", -signal.SIGINT), ("click", -signal.SIGINT), ("atoll.kernel.client", -signal.SIGINT),
     ("atoll.bench.ring", 130)],
)  # fmt: skip
def test_ctrl_c_while_modules_are_imported_shows_no_traceback(tmp_path: Path, at: str, status: int) -> None:
    done = interrupted(tmp_path, at, "bench", "ring")
    assert (done.returncode, done.stdout, done.stderr.strip()) == (status, "", "")


def test_ctrl_c_in_a_process_of_a_measurement_shows_no_traceback(tmp_path: Path) -> None:
    line = one_line(interrupted(tmp_path, "fork", "bench", "ring", "--seconds", "0.01"), 1)
    assert f"a process ended with {int(signal.SIGINT)}" in line


def forks_of(process: psutil.Process) -> list[psutil.Process]:
    """Not the programs that it runs."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [each for each in process.children() if each.cmdline() == process.cmdline()]
    return []


def test_processes_of_a_measurement_end_with_it() -> None:
    with subprocess.Popen([str(ATOLL), "bench", "ring", "--seconds", "86400"]) as bench:
        try:
            process = psutil.Process(bench.pid)
            children = wait_for("it measures", lambda: forks_of(process))
        finally:
            bench.kill()
        wait_for("they are gone", lambda: not any(each.is_running() for each in children))


def test_asking_imports_nothing_heavy() -> None:
    """A command that asks a question starts fast: no tables, no plots, no C."""
    heavy = ["rich", "matplotlib", "numpy", "psutil", "cffi", "asyncio"]
    code = f"import sys, atoll.kernel.cli; print([m for m in sys.modules if m.split('.')[0] in {heavy}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


def test_a_document_may_name_files_whose_names_are_not_utf_8(capsys: pytest.CaptureFixture[str]) -> None:
    document = {"image": "é\udcff.img"}
    cli_options.emit(document)
    printed = capsys.readouterr().out
    assert json.loads(printed.encode()) == document
    assert "é" in printed
