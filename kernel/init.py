"""init: the process of `atoll serve`. It makes what outlives everybody else (world.py), forks zygote and kernel, reaps
whoever dies, forks either again, and ends the service when it is told to.

- `run(config) -> exit status`

All processes of the instance are its children and die with it. After a crash of init: the data directory holds the
record of the instance, shared memory the acknowledged writes; the next `run` adopts them.
"""

import contextlib
import gc
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from atoll.ipc import objects, physmap
from atoll.kernel import main, messages, process, table, world, zygote
from atoll.kernel.instance import EXIT_FAILED, BootError, Directory
from atoll.kernel.surroundings import notify, warnings

log = logging.getLogger("atoll")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PROTECTED_OOM_SCORE = -900
# A child that lives shorter than this, so many times in a row, is forked later and later.
SHORT_LIFE_S = 1.0
SHORT_LIVES = 3
BACKOFF_MAX_S = 5.0
FORK_AGAIN_S = 0.1
# A kernel that takes over is not hanging yet; nor does a long bound mean that nobody looks.
HANG_MIN_S = 1.0
LOOK_MAX_S = 60.0


def run(config: dict[str, Any]) -> int:
    """Runs the service until it is stopped. `config` as Config.as_dict() makes it."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s[%(process)d] %(message)s", force=True
    )
    try:
        directory = Directory.open(config["data"])
        made = world.build(config, directory)
    except (BootError, ImportError, objects.ObjectError) as error:
        _say(f"atoll: {error}", sys.stderr)
        return error.status if isinstance(error, BootError) else EXIT_FAILED
    for line in warnings():
        log.warning("%s", line)
    return Init(made).run()


def _say(line: str, stream: TextIO) -> None:
    """To whoever started the service. He may read no more, which is no reason to end."""
    try:
        print(line, file=stream, flush=True)
    except OSError:
        process.silence(stream)


class Child:
    """Zygote or kernel: forked by init itself, and again whenever it dies."""

    def __init__(self, name: str, play: Callable[[world.World], Any]) -> None:
        self.name = name
        self.play = play
        self.pid = 0
        self.started = 0.0
        self.short_lives = 0
        self.not_before = 0.0

    def ended(self, status: int) -> None:
        now = time.monotonic()
        self.pid = 0
        by_itself = process.signal_of(status) != signal.SIGKILL  # a kill from outside is nobody's fault
        self.short_lives = self.short_lives + 1 if by_itself and now - self.started < SHORT_LIFE_S else 0
        late = self.short_lives - SHORT_LIVES
        self.not_before = now + (0.0 if late < 0 else min(BACKOFF_MAX_S, 0.1 * 2**late))


class Init:
    def __init__(self, made: world.World) -> None:
        self.world = made
        self.kernel = Child("kernel", main.run)
        self.zygote = Child("zygote", zygote.run)
        self.stop_reason = ""
        self.status: int | None = None
        self.booted = False
        self._own_score = "0"
        self._progress = (-1, 0.0)  # the kernel's, and when it last moved
        self._looked = 0.0

    def run(self) -> int:
        process.adopt_orphans()
        with contextlib.suppress(OSError):
            self._own_score = Path("/proc/self/oom_score_adj").read_text().strip()
        process.be_protected(PROTECTED_OOM_SCORE)
        self._map_kernel_arena()
        wake, wakened = socket.socketpair()
        wake.setblocking(False)
        wakened.setblocking(False)
        for number in (*STOP_SIGNALS, signal.SIGCHLD):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants it
                signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(wakened.fileno(), warn_on_full_buffer=False)
        assert self.world.init_channel is not None
        channel = self.world.init_channel[0]
        poll = select.poll()
        poll.register(wake, select.POLLIN)
        poll.register(channel, select.POLLIN)
        gc.collect()
        gc.freeze()  # forking touches, and so copies, less
        while self.status is None:
            for child in (self.zygote, self.kernel):
                if child.pid == 0 and time.monotonic() >= child.not_before:
                    self._fork(child)
            poll.poll(self._patience_ms())
            with contextlib.suppress(BlockingIOError):
                for received in wake.recv(4096):
                    if received in STOP_SIGNALS:
                        self._stop(signal.Signals(received).name)
            self._reap()
            self._listen(channel)
            self._look_at_kernel()
        return self.status

    # --- Children ---

    def _fork(self, child: Child) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        if child is self.zygote:
            self.world.zygote_starts += 1
        try:
            pid = os.fork()
        except OSError as error:  # no process or memory to be had: everybody else goes on meanwhile
            log.error("%s: cannot be forked: %s", child.name, error.strerror)
            child.not_before = time.monotonic() + FORK_AGAIN_S
            if child is self.zygote:
                self.world.zygote_starts -= 1
            return
        if pid != 0:
            child.pid, child.started = pid, time.monotonic()
            if child is self.kernel:
                self._progress = (-1, child.started)
                if self.stop_reason:  # its predecessor may have died with the message in its hand
                    self._tell_stop()
            return
        status = 70
        try:
            signal.set_wakeup_fd(-1)
            for number in (*STOP_SIGNALS, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            os.setsid()  # what a terminal sends goes to init alone
            process.be_protected(int(self._own_score))
            child.play(self.world)
        except BaseException:
            log.exception("%s ends", child.name)
        finally:
            logging.shutdown()
            os._exit(status)

    def _reap(self) -> None:
        """The kernel asks /proc how a process ended, and where that is gone, what it was told: so it is told first."""
        assert self.world.init_channel is not None
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            pid = ended.si_pid
            status = ended.si_status << 8 if ended.si_code == os.CLD_EXITED else ended.si_status  # as waitpid gives it
            for child in (self.kernel, self.zygote):
                if pid == child.pid:
                    child.ended(status)
                    log.warning("%s: process %d %s", child.name, pid, process.describe(status))
                    break
            else:
                messages.send(self.world.init_channel[0], {"ended": pid, "status": status})
            os.waitpid(pid, 0)

    def _patience_ms(self) -> float:
        """Until the next look at the kernel, or the next fork of a child that died too often."""
        waiting = [child.not_before - time.monotonic() for child in (self.kernel, self.zygote) if child.pid == 0]
        return max(0.0, min([self._hang_s() / 2, LOOK_MAX_S, *waiting])) * 1000

    # --- Messages ---

    def _listen(self, channel: socket.socket) -> None:
        while self.status is None and (received := messages.receive(channel)) is not None:
            message, _ = received
            if "booted" in message and not self.booted:
                self.booted = True
                if self.world.config["grow"]:
                    self.world.directory.want_grow(False)  # the store is loaded: it has grown
                for line in message["booted"]:
                    _say(line, sys.stdout)
                self.world.record.served = True
                self._write_record()  # if it cannot be: the arenas tell it too
                notify("READY=1\nSTATUS=serving")
            elif "failed" in message:
                self._end(keep=self.world.adopted)
                self.status = EXIT_FAILED
                _say(f"atoll: {message['failed']}", sys.stderr)  # nobody is left who could say more
            elif "stopped" in message:
                self._end(keep=not message["stopped"])
                self.status = 0 if message["stopped"] else EXIT_FAILED
                if not message["stopped"]:
                    _say(
                        f"atoll: {message['reason']}: what was acknowledged stays in shared memory for the next start",
                        sys.stderr,
                    )

    def _stop(self, reason: str) -> None:
        if self.stop_reason:
            log.warning("%s again: everything is ended at once; the next start goes on from shared memory", reason)
            self._end(keep=self.world.record.served)
            self.status = EXIT_FAILED
            return
        self.stop_reason = reason
        notify("STOPPING=1")
        self._tell_stop()

    def _tell_stop(self) -> None:
        """Told twice it does no harm."""
        assert self.world.init_channel is not None
        messages.send(self.world.init_channel[0], {"stop": self.stop_reason})

    def _end(self, keep: bool) -> None:
        """Ends all processes and removes the shared objects, but for acknowledged writes that are nowhere else."""
        self.kernel.not_before = self.zygote.not_before = float("inf")
        while pids := process.children(os.getpid()):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pids[0], 0)
        if not keep:  # before the objects go: their absence must not look like a loss
            self.world.record.clean = True
            keep = not self._write_record()  # not known to be clean: taken over by the next start
        self.world.close(keep=table.KEPT if keep else ())

    def _write_record(self) -> bool:
        try:
            self.world.record.write(self.world.directory.path)
        except OSError as error:
            log.error("%s/instance.json cannot be written: %s", self.world.directory.path, error.strerror)
            return False
        return True

    # --- The kernel's hangs ---

    def _hang_s(self) -> float:
        return max(HANG_MIN_S, 2 * float(self.world.config["kernel"]["hang_s"]))

    def _map_kernel_arena(self) -> None:
        size = self.world.arenas["kernel"].arena_bytes
        descriptor = objects.open_read_only(objects.arena_name(self.world.instance, "kernel"))
        physmap.map_arena(table.KERNEL.number, descriptor, size)
        os.close(descriptor)

    def _look_at_kernel(self) -> None:
        """The kernel's loop turns several times per `hang_s`, work or none.

        init looks more often than that, too: who comes late was stopped, and perhaps the kernel with it.
        """
        now = time.monotonic()
        late, self._looked = now - self._looked > self._hang_s(), now
        if self.kernel.pid == 0:
            return
        progress, since = self._progress
        found = int(physmap.header(table.KERNEL.number).progress)
        if found != progress or late:
            self._progress = (found, now)
        elif now - since > self._hang_s():
            log.warning("kernel: process %d hangs: killed", self.kernel.pid)
            self._progress = (found, now)
            os.kill(self.kernel.pid, signal.SIGKILL)
