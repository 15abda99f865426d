"""The command `atoll` from its first instruction on: what is true while the command line (cli.py) is imported.

- `main()`   the entry point of the package

Ctrl-C is Python's own KeyboardInterrupt, with a traceback, until somebody catches it. Until cli.py does, it ends the
command as the signal does by default; where it was ignored (for what a script starts with &) it stays so.
"""

import signal


def main() -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from atoll.kernel import cli

    cli.main()
