"""The life and death of domains: every decision about who plays a role is made here, in the kernel's one loop.

- `Supervisor(loop, world, domain, rows, calls)`; `adopt()` once; then events: `locks_died`, `process_ended`,
  `from_zygote`, `from_init`, `look_around` (after a wake-up), `check_hangs` (timer)
- `may_start`, `on_serving`, `on_died`, `on_stopped`: set by those who start and stop the service (service.py)

Death is noticed by the role lock (at once; a single-threaded process runs no instruction after it) or, where the role
has threads or no lock was taken yet, by the pidfd. The intent is recorded, then the standby gets its order; the standby
itself takes the lock before it writes, so two kernels in a row cannot make two active processes.

After a crash of the kernel: domains go on. `adopt` of the next one compares its predecessor's records with locks and
start times: what runs is adopted, what died is replaced, a promotion under way is finished, processes that nobody
recorded are ended.
"""

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from atoll.ipc import objects, physmap, rolelock
from atoll.ipc._ipc import ffi, lib
from atoll.ipc.crashpoint import crash_point
from atoll.kernel import messages, process, table
from atoll.kernel.calls import Calls
from atoll.kernel.life import Life, Phase
from atoll.kernel.loop import Loop
from atoll.kernel.process import Process
from atoll.kernel.records import Rows
from atoll.kernel.watch import LockWatch
from atoll.kernel.world import World

log = logging.getLogger("atoll.kernel")

MS = 1_000_000
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
SECOND = 1_000_000_000

# A promoted standby has the lock within a millisecond; it is told again after the first time, ended after the second.
RESEND_NS = 20 * MS
LOCK_BOUND_NS = 2 * SECOND
# From the lock to SERVING, unless `progress` moves.
START_BOUND_NS = 5 * SECOND
# A zygote that has not answered by then is ended; init makes another.
ZYGOTE_BOUND_NS = 3 * SECOND
# A crash continues a row if its process had not served longer than this; the row's first ones cost no wait, so that a
# single crash shows to clients as briefly as a kill.
SHORT_LIFE_NS = SECOND
FREE_CRASHES = 2
FIRST_BACKOFF_NS = 50 * MS
# How long the signal of a death may stay unknown before the successor is promoted without it.
SIGNAL_WAIT_S = 0.005
# init takes a kernel whose loop does not turn for hung: it turns at least so often.
LOOK_MAX_NS = SECOND // 4
# Ends of processes remembered as init told them.
ENDED_KEPT = 64


class Supervisor:
    def __init__(self, loop: Loop, world: World, domain: Any, rows: Rows, calls: Calls) -> None:
        self.loop = loop
        self.world = world
        self.domain = domain
        self.rows = rows
        self.calls = calls
        self.lives = {role.name: Life(role, table.threaded(role, world.config)) for role in table.DOMAINS}
        self.zygote: Process | None = None
        self.zygote_starts = 0
        self.synced = False
        self._sync = 0  # the number that the last question had
        self.ending = False  # the service stops: nobody who ended in order is replaced
        self.may_start: Callable[[Life], bool] = lambda life: True
        self.on_serving: Callable[[Life], None] = lambda life: None
        self.on_died: Callable[[Life, bool], None] = lambda life, failed: None  # failed: it has said why
        self.on_stopped: Callable[[Life], None] = lambda life: None
        self._ended: dict[int, int] = {}  # pid: wait status, as init tells it
        self._hang_ns = int(world.config["kernel"]["hang_s"] * SECOND)
        self._backoff_ns = int(world.config["kernel"]["restart_backoff_s"] * SECOND)
        self._zygote_asked_ns = 0
        notify = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._watch = LockWatch(notify)
        loop.add(notify, lambda: self._locks_died(notify))
        assert world.zygote_channel is not None
        self._to_zygote = world.zygote_channel[0]
        loop.add(self._to_zygote.fileno(), self.from_zygote)

    # --- Beginning ---

    def adopt(self) -> None:
        """Makes of the predecessor's records what is true now. On the first start there are none."""
        self._watch.start()
        self.loop.drain_init()
        for life in self.lives.values():
            pid, start_time = life.restore(self.rows)
            if life.standby is not None:
                self._follow(life.standby, life)
            owner = rolelock.owner(life.role.number)
            if life.phase in (Phase.EMPTY, Phase.STOPPED):
                continue
            life.active = Process.open(pid, start_time)
            if life.active is None:
                self._bury(life, pid)
                continue
            self._follow(life.active, life)
            if owner == pid:
                self._watch.arm(life.role.number, pid)
                if life.phase is Phase.PROMOTING:
                    life.phase = Phase.RECOVERING
                if life.phase is Phase.DYING:
                    life.active.send(signal.SIGKILL)
                elif life.phase is Phase.SERVING:
                    self._make_ordinary(life)
                else:
                    self._expect_start(life)
            elif life.phase is Phase.PROMOTING:
                self._send_order(life)
                self._expect_start(life)
            elif not life.threaded:
                self._bury(life, pid)
            # With threads: dead by its lock, its pidfd tells when it is gone.
        self._ask_sync()
        self.look_around()
        for life in self.lives.values():
            self.decide(life)

    # --- Deciding ---

    def decide(self, life: Life) -> None:
        """Fills an empty role and sees to a standby."""
        if life.phase is Phase.STOPPED:
            return
        if life.standby is None:
            if life.phase in (Phase.EMPTY, Phase.SERVING):
                self._ask_standby(life)
            return
        if life.phase is not Phase.EMPTY:
            return
        if not self.may_start(life):
            return
        now = time.monotonic_ns()
        if now < life.not_before_ns:
            self.loop.at(life.not_before_ns, lambda: self.decide(life))
            return
        owner = rolelock.owner(life.role.number)
        if owner:  # recorded by nobody, and alive: it goes first
            log.error("%s is held by process %d, which nobody recorded: ended", life.role.name, owner)
            with contextlib.suppress(ProcessLookupError):  # it may just have ended
                os.kill(owner, signal.SIGKILL)
            self.loop.at(now + RESEND_NS, lambda: self.decide(life))
            return
        found = life.standby.look()
        if found is None or found.stopped or found.gone:
            self._drop_standby(life)
            self._ask_standby(life)
            return
        self._promote(life)

    def _promote(self, life: Life) -> None:
        header = physmap.header(life.role.number)
        life.active, life.standby = life.standby, None
        life.incarnation = max(life.incarnation, int(header.incarnation)) + 1
        life.phase = Phase.PROMOTING
        life.promoted_ns = time.monotonic_ns()
        life.resend_ns = life.promoted_ns + RESEND_NS
        life.record(self.rows)  # the intent: the next kernel goes on from here
        self._expect_start(life)  # sends the order again, should it not be possible now
        crash_point(self.domain, "kernel.promote.before")
        self._send_order(life)
        crash_point(self.domain, "kernel.promote.after")

    def _send_order(self, life: Life) -> None:
        """Sent twice it does no harm: it is for one process, which reads one."""
        assert life.active is not None
        name, world = life.role.name, self.world
        order = {
            "pid": life.active.pid,
            "start_time": life.active.start_time,
            "incarnation": life.incarnation,
            "previous_signal": life.previous_signal,
            "fresh": not life.served and not (world.adopted and name in table.KEPT),
            "adopted": world.adopted and name in table.KEPT and not life.served,
        }
        descriptors = [
            objects.open_writable(objects.arena_name(world.instance, name)),
            objects.open_writable(objects.lock_name(world.instance, name)),
        ]
        try:
            messages.send(world.promotion[name][0], order, descriptors)
        finally:
            messages.close_all(descriptors)
        life.resend_ns = time.monotonic_ns() + RESEND_NS

    def _make_ordinary(self, life: Life) -> None:
        assert life.active is not None
        process.be_ordinary(life.active.pid, life.role.slice_ns(self.world.slice_ns))

    def _expect_start(self, life: Life) -> None:
        """Looks after a process on its way to SERVING; late is dead."""
        started, bound_at = life.active, [time.monotonic_ns()]
        life.start_progress = -1

        def look() -> None:
            if life.active is not started or life.phase not in (Phase.PROMOTING, Phase.RECOVERING):
                return
            again_ns = RESEND_NS if life.phase is Phase.PROMOTING else SECOND // 4
            self.loop.at(time.monotonic_ns() + again_ns, look)  # whatever fails below
            self._observe(life)
            if life.phase not in (Phase.PROMOTING, Phase.RECOVERING):
                return
            now = time.monotonic_ns()
            if life.active is not None:
                self._make_ordinary(life)  # it came first for long enough
            if life.phase is Phase.PROMOTING:
                if now - bound_at[0] > LOCK_BOUND_NS:
                    self._end_late(life, "has not taken its role")
                elif now > life.resend_ns:
                    self._send_order(life)
            else:
                progress = int(physmap.header(life.role.number).progress)
                if progress != life.start_progress:
                    life.start_progress, bound_at[0] = progress, now
                elif now - bound_at[0] > START_BOUND_NS:
                    self._end_late(life, "does not serve")

        self.loop.at(time.monotonic_ns() + RESEND_NS, look)

    def _end_late(self, life: Life, what: str) -> None:
        assert life.active is not None
        log.error("%s: process %d %s: killed", life.role.name, life.active.pid, what)
        self.kill_active(life, blame=signal.SIGABRT)

    def kill_active(self, life: Life, blame: int) -> None:
        """SIGKILL; `blame` is what the successor is told instead (a hang counts as the domain's own crash)."""
        assert life.active is not None
        life.blame = blame
        life.phase = Phase.DYING
        life.record(self.rows)
        life.active.send(signal.SIGKILL)

    # --- Death ---

    def _locks_died(self, notify: int) -> None:
        os.eventfd_read(notify)
        now = time.monotonic_ns()
        for number, pid in self._watch.taken():
            life = self.lives[table.NAMES[number]]
            if life.active is None or life.active.pid != pid:
                continue
            life.detected_ns = now
            if life.threaded and not life.active.gone():
                life.phase = Phase.DYING
                life.record(self.rows)  # its pidfd tells when its last thread has ended
                continue
            self._bury(life, pid)

    def _follow(self, followed: Process, life: Life) -> None:
        self.loop.add(followed.pidfd, lambda: self._process_ended(followed, life))

    def _unfollow(self, followed: Process) -> None:
        if followed.pidfd >= 0:
            self.loop.remove(followed.pidfd)
            followed.close()

    def _process_ended(self, ended: Process, life: Life) -> None:
        if ended.pidfd < 0 or not ended.gone():
            return  # meant for another that had this descriptor's number a moment ago
        if ended is life.standby:
            self._standby_failed(life)
            self._drop_standby(life)
            self.decide(life)
        elif ended is life.active:
            life.detected_ns = life.detected_ns or time.monotonic_ns()
            self._bury(life, ended.pid)
        else:
            self._unfollow(ended)

    def _bury(self, life: Life, pid: int) -> None:
        """The active process is dead: nothing of it runs any more."""
        crash_point(self.domain, "kernel.promote.bury")
        now = time.monotonic_ns()
        header = physmap.header(life.role.number)
        # Said after everything was handed over: it has nothing left to do but to end.
        orderly = self.ending and header.state == lib.ATOLL_STATE_STOPPED and header.incarnation == life.incarnation
        status = 0 if orderly else self._status_of(life, pid)
        number = 0 if status is None else process.signal_of(status)
        if life.active is not None:
            self._unfollow(life.active)
            life.active = None
        self._watch.disarm(life.role.number)
        if table.LATENCY in life.role.rights:
            self.world.latency.let_go()
        life.last_end = "ended" if status is None else process.describe(status)
        if orderly:
            life.phase = Phase.STOPPED
            life.record(self.rows)
            self.on_stopped(life)
            return
        failed = header.state == lib.ATOLL_STATE_FAILED and status is not None and number == 0
        life.reason = ffi.string(header.reason).decode(errors="replace") if failed else ""
        own = number in process.OWN_SIGNALS or life.blame in process.OWN_SIGNALS or (status is not None and number == 0)
        if own:
            served_ns = now - int(header.serving_ns) if int(header.serving_ns) >= life.promoted_ns else 0
            life.crashes = life.crashes + 1 if served_ns < SHORT_LIFE_NS else 1
            if life.crashes > FREE_CRASHES:
                wait_ns = min(FIRST_BACKOFF_NS << min(life.crashes - FREE_CRASHES - 1, 20), self._backoff_ns)
                life.not_before_ns = now + wait_ns
                life.reason = life.reason or f"{life.last_end}, {life.crashes} times in a row"
        else:
            life.not_before_ns = 0
        if header.incarnation == life.incarnation and header.pid == pid:
            life.previous_signal = life.blame or number  # else it has done nothing, and what counts is who did
        life.blame = 0
        life.restarts += 1
        life.phase = Phase.EMPTY
        life.record(self.rows)
        because = f": {life.reason}" if life.reason else ""
        self.on_died(life, failed)  # before the next one begins
        self.decide(life)  # before the log: a client waits
        log.warning("%s: process %d %s%s", life.role.name, pid, life.last_end, because)

    def _status_of(self, life: Life, pid: int) -> int | None:
        """Wait status of a dead or dying process: /proc tells it from the first moment, init once it has reaped.

        None where neither does.
        """
        deadline = time.monotonic() + SIGNAL_WAIT_S
        while True:
            found = life.active.look() if life.active is not None else None
            if found is not None and found.exit_status:
                self._ended.pop(pid, None)
                return found.exit_status
            # Zero may mean that this user may not read it (a process that has changed its user): init knows.
            self.loop.drain_init()
            if pid in self._ended:
                return self._ended.pop(pid)
            if time.monotonic() >= deadline:
                return None
            time.sleep(SIGNAL_WAIT_S / 50)

    def note_ended(self, pid: int, status: int) -> None:
        """Init has reaped a process."""
        self._ended[pid] = status
        while len(self._ended) > ENDED_KEPT:
            del self._ended[next(iter(self._ended))]

    # --- Standbys ---

    def _ask_standby(self, life: Life) -> None:
        now = time.monotonic_ns()
        if not self.synced or (self.ending and life.phase is not Phase.EMPTY):
            return
        if life.standby_asked_ns:
            return  # the answer is under way
        if now < life.standby_not_before_ns:
            self.loop.at(life.standby_not_before_ns, lambda: self.decide(life))
            return
        life.standby_asked_ns = now
        self._ask_zygote({"fork": life.role.name})

    def _ask_sync(self) -> None:
        """The answer says that all that was asked for before has been answered, or never will be."""
        self._sync = time.monotonic_ns()  # no predecessor's, either
        self._ask_zygote({"sync": self._sync})

    def _ask_zygote(self, message: dict[str, Any]) -> None:
        asked = self._zygote_asked_ns = time.monotonic_ns()
        messages.send(self._to_zygote, message)

        def late() -> None:
            silent = self._zygote_asked_ns == asked or any(
                0 < life.standby_asked_ns <= asked for life in self.lives.values()
            )  # it may have answered another before
            if not silent:
                return
            for pid in self._late_zygotes():
                log.error("zygote: process %d does not answer: killed", pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.loop.at(time.monotonic_ns() + ZYGOTE_BOUND_NS, late)  # the next one may not answer, either

        self.loop.at(asked + ZYGOTE_BOUND_NS, late)

    def _late_zygotes(self) -> list[int]:
        """Zygotes that have had the time to answer, whether they have ever said hello to this kernel or not."""
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        return [
            pid
            for pid in process.children(self.world.init_pid)
            if process.name_of(pid) == "atoll-zygote"
            and now - process.start_time(pid) / CLOCK_TICKS > ZYGOTE_BOUND_NS / SECOND
        ]

    def from_zygote(self) -> None:
        while (received := messages.receive(self._to_zygote)) is not None:
            message, _ = received
            if "synced" in message and message["synced"] != self._sync:
                continue  # what was asked for since may have been forked: no stray
            self._zygote_asked_ns = 0
            if "role" in message:
                self._new_standby(self.lives[message["role"]], message["pid"], message["start_time"])
                continue
            if self.zygote is not None:
                self.zygote.close()
            self.zygote = Process.open(message["pid"], message["start_time"])
            self.zygote_starts = message["starts"]
            if "hello" in message and not self.synced:
                self._ask_sync()  # the first may have died with another zygote
                continue
            self.synced = True
            self._end_strays()
            for life in self.lives.values():  # what an earlier zygote was asked for will not come
                life.standby_asked_ns = 0
                self.decide(life)

    def _standby_failed(self, life: Life) -> None:
        life.standby_failures += 1
        wait_ns = min(FIRST_BACKOFF_NS << min(life.standby_failures - 1, 10), self._backoff_ns)
        life.standby_not_before_ns = time.monotonic_ns() + (0 if life.standby_failures <= 2 else wait_ns)

    def _new_standby(self, life: Life, pid: int, start_time: int) -> None:
        life.standby_asked_ns = 0
        try:
            fresh = Process.open(pid, start_time)
        except OSError as error:  # it must not read orders meant for another
            log.error("%s: standby %d cannot be had: %s: ended", life.role.name, pid, error.strerror)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            fresh = None
        if fresh is None:
            self._standby_failed(life)
        elif life.standby is not None or (self.ending and life.phase is not Phase.EMPTY):
            fresh.send(signal.SIGKILL)  # two would read the same channel
            fresh.close()
            return
        else:
            crash_point(self.domain, "kernel.promote.standby")
            life.standby = fresh
            life.record(self.rows)
            self._follow(fresh, life)
        self.decide(life)

    def _drop_standby(self, life: Life) -> None:
        if life.standby is None:
            return
        dropped, life.standby = life.standby, None
        dropped.send(signal.SIGKILL)
        self._unfollow(dropped)
        life.record(self.rows)

    def drop_standbys(self) -> None:
        for life in self.lives.values():
            self._drop_standby(life)

    def _end_strays(self) -> None:
        """Children of init that are in no record: forked for a kernel that died before it wrote them down."""
        known = {os.getpid(), 0 if self.zygote is None else self.zygote.pid}
        for life in self.lives.values():
            known |= {each.pid for each in (life.active, life.standby) if each is not None}
        for pid in process.children(self.world.init_pid):
            if pid in known:
                continue
            name, found = process.name_of(pid), process.look(pid)
            if name.startswith("atoll-") and found is not None and not found.gone:
                log.warning("process %d (%s) belongs to nobody: ended", pid, name)
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass

    # --- Looking ---

    def look_around(self) -> None:
        """After a wake-up: has anybody who was starting got further?"""
        for life in self.lives.values():
            if life.phase in (Phase.PROMOTING, Phase.RECOVERING):
                self._observe(life)

    def _observe(self, life: Life) -> None:
        assert life.active is not None
        header = physmap.header(life.role.number)
        if life.phase is Phase.PROMOTING and rolelock.owner(life.role.number) == life.active.pid:
            life.phase = Phase.RECOVERING
            life.record(self.rows)
            self._watch.arm(life.role.number, life.active.pid)
        if (
            life.phase is Phase.RECOVERING
            and header.pid == life.active.pid
            and physmap.serves(header, life.incarnation)
        ):
            crash_point(self.domain, "kernel.promote.serving")
            life.phase = Phase.SERVING
            life.served = True
            life.reason = ""
            life.standby_failures = 0
            life.hang_progress = -1
            self._make_ordinary(life)
            life.record(self.rows)
            log.info(
                "%s: process %d serves (incarnation %d, %.1f ms after its promotion)",
                life.role.name,
                life.active.pid,
                life.incarnation,
                (int(header.serving_ns) - life.promoted_ns) / 1e6,
            )
            self.calls.served(life.role.name)
            self.on_serving(life)
            life.detected_ns = 0
            self.decide(life)

    # --- Hangs ---

    def check_hangs(self) -> None:
        """Work to do and no turn of the loop for `hang_s`: hung. In its sleep, without work, the clock does not run."""
        now = time.monotonic_ns()
        self.loop.at(now + min(self._hang_ns // 4, LOOK_MAX_NS), self.check_hangs)
        for life in self.lives.values():
            if life.phase is Phase.EMPTY or (life.phase is Phase.SERVING and life.standby is None):
                self.decide(life)  # something may have failed for want of descriptors or processes
        for life in self.lives.values():
            if life.phase is not Phase.SERVING or life.active is None:
                continue
            progress = int(physmap.header(life.role.number).progress)
            if progress != life.hang_progress or not self._has_work(life):
                life.hang_progress, life.hang_since_ns, life.hang_ticks = progress, now, -1
            elif now - life.hang_since_ns >= self._hang_ns:
                if self._kill_misleading(life, now):
                    life.hang_progress = -1
                    continue
                found = life.active.look()
                if found is None or found.gone or self._starved(life, found):
                    continue
                stopped = found.stopped
                log.warning(
                    "%s: process %d has work and made no progress for %.1f s (%s): killed",
                    life.role.name,
                    life.active.pid,
                    (now - life.hang_since_ns) / SECOND,
                    "stopped from outside" if stopped else f"state {found.state}",
                )
                life.detected_ns = now
                # Who was stopped from outside has done nothing wrong.
                self.kill_active(life, blame=signal.SIGSTOP if stopped else signal.SIGABRT)

    def _has_work(self, life: Life) -> bool:
        """A message waits, or it is in the middle of something. A driver's work also comes from where nobody else sees
        it, from clients and the device: a stopped one is never without."""
        if self._pending(life) or not physmap.header(life.role.number).sleeping:
            return True
        if not life.role.rights:
            return False
        found = life.active.look() if life.active is not None else None
        return found is not None and found.stopped

    def _starved(self, life: Life, found: process.Look) -> bool:
        """True while it would run and gets no processor; an endless loop has used some after its bound."""
        if found.state != "R":
            return False
        if life.hang_ticks < 0:
            life.hang_ticks = found.cpu_ticks
        return (found.cpu_ticks - life.hang_ticks) * SECOND < self._hang_ns // 4 * CLOCK_TICKS

    def _rings_to(self, life: Life) -> Iterator[tuple[table.Role, Any, int]]:
        """From whom a role has rings, with their producers' halves and the role's heads. Others wrote what is read:
        offsets are checked."""
        own = physmap.header(life.role.number)
        for peer in table.ROLES.values():
            if life.role.name not in peer.rings_to:
                continue
            offset = int(physmap.header(peer.number).tx_offset[life.role.number])
            if 0 < offset <= self.world.arenas[peer.name].arena_bytes - 4096:
                producer = ffi.cast("struct atoll_ring_producer *", physmap.address(peer.number) + offset)
                yield peer, producer, int(own.consumer[peer.number].head)

    def _pending(self, life: Life) -> bool:
        """True if a message waits on a ring to the role."""
        return any(producer.tail != head for _, producer, head in self._rings_to(life))

    def _kill_misleading(self, life: Life, now: int) -> bool:
        """Kills who has published more messages for a role than the ring holds, and not what it has committed. The role
        takes none of them (I8) and is not to blame; a successor publishes what was committed."""
        for peer, producer, head in self._rings_to(life):
            sender = self.lives.get(peer.name)
            if sender is None or sender.active is None or sender.phase is not Phase.SERVING:
                continue
            tail, entries = int(producer.tail), int(producer.entry_count)
            claimed = (tail - head) % (1 << 32)
            if claimed <= entries or tail == producer.tail_committed:
                continue
            log.warning(
                "%s: process %d has published %d messages to %s in a ring of %d: killed",
                peer.name,
                sender.active.pid,
                claimed,
                life.role.name,
                entries,
            )
            sender.detected_ns = now
            self.kill_active(sender, blame=signal.SIGABRT)
            return True
        return False
