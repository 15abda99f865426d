"""The start and the stop of the service as a whole: the order of the roles, the volumes, what is said when.

Start: disk, dedup and nbd; then the volumes of the configuration are made where they are missing; then nic, so that the
first client finds everything. Stop: nic answers and closes its clients, nbd ends, dedup writes everything out and marks
the store clean, disk ends.

- `Service(supervisor, calls, rows, tell_init)`; `begin()`, `stop(reason)`, `waiting_for()`

After a crash of the kernel: how far the service is stands in its row (records.py); the successor goes on. A stop is
asked for again from each role that has not ended; a domain that dies on the way is replaced and asked again.
"""

import logging
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from atoll.kernel import table
from atoll.kernel.calls import Calls
from atoll.kernel.life import Life, Phase
from atoll.kernel.listeners import uris
from atoll.kernel.records import SERVICE, Rows, ServiceWord
from atoll.kernel.supervisor import SECOND, Supervisor
from atoll.kernel.views import volumes
from atoll.kernel.world import World

log = logging.getLogger("atoll.kernel")

# Roles that hold nothing of their own that must reach the device: they are ended if they do not end by then.
STOP_BOUND_NS = {"nic": 5 * SECOND, "nbd": 5 * SECOND, "disk": 5 * SECOND, "llrrm": 5 * SECOND}
# From a role's answer to its end.
EXIT_BOUND_NS = 2 * SECOND
SAY_EVERY_NS = 10 * SECOND
CALL_TIMEOUT_S = 30.0
# A role that ends by itself so often before it ever served keeps the service from starting (or stopping in order).
BOOT_CRASHES = 4


class Service:
    def __init__(
        self,
        world: World,
        supervisor: Supervisor,
        calls: Calls,
        rows: Rows,
        tell_init: Callable[[dict[str, Any]], None],
    ) -> None:
        self.world = world
        self.supervisor = supervisor
        self.calls = calls
        self.rows = rows
        self.tell_init = tell_init
        self.words = rows.read(SERVICE)
        self.volumes_ready = self.booted
        self.stopping = bool(self.words[ServiceWord.STOPPING])
        self.finished = False
        self.given_up = False
        self._making_volumes = False
        self._clean = True
        self._unclean_reason = ""
        self._asked: dict[str, int] = {}  # role: when it was asked to stop
        self._answered: dict[str, int] = {}
        self._stop_since_ns = 0
        supervisor.may_start = self.may_start
        supervisor.on_serving = self.on_serving
        supervisor.on_died = self.on_died
        supervisor.on_stopped = lambda life: self._stop_step()
        supervisor.ending = self.stopping

    @property
    def booted(self) -> bool:
        return bool(self.words[ServiceWord.BOOTED])

    def set(self, word: ServiceWord, value: int) -> None:
        self.words[word] = value
        self.rows.write(SERVICE, self.words)

    # --- Start ---

    def begin(self) -> None:
        if self.stopping:
            self._begin_stop()
        elif not self.booted:
            self._boot_step()
            self.supervisor.loop.at(time.monotonic_ns() + SAY_EVERY_NS, self._say_starting)

    def _say_starting(self) -> None:
        if self.booted or self.stopping or self.given_up:
            return
        waiting = [life.role.name for life in self.supervisor.lives.values() if not life.served]
        seconds = (time.monotonic_ns() - self.world.started_ns) / SECOND
        log.info("starting for %.0f s, waiting for %s", seconds, ", ".join(waiting) or "the volumes")
        self.supervisor.loop.at(time.monotonic_ns() + SAY_EVERY_NS, self._say_starting)

    def may_start(self, life: Life) -> bool:
        """While the service starts: each role after those it stands on."""
        if self.given_up:
            return False
        if self.booted or self.stopping:
            return True
        if life.role.name == "nic" and not self.volumes_ready:
            return False
        lives = self.supervisor.lives.values()
        return all(other.served or other.role.optional for other in lives if other.role.boot < life.role.boot)

    def on_serving(self, life: Life) -> None:
        for waiting in life.waiting_kills:
            waiting(life)
        life.waiting_kills.clear()
        if self.stopping:
            self._asked.pop(life.role.name, None)
            self._answered.pop(life.role.name, None)
            self._stop_step()
        elif not self.booted:
            self._boot_step()

    def on_died(self, life: Life, failed: bool) -> None:
        """While the service starts, a role that cannot is reason enough to end; later it is tried again and again."""
        if self.booted or self.stopping or life.role.optional:
            return
        if failed or (not life.served and life.crashes >= BOOT_CRASHES):
            self._give_up(f"{life.role.name}: {life.reason}")

    def _give_up(self, reason: str) -> None:
        if self.given_up:
            return
        self.given_up = True
        self.tell_init({"failed": reason})

    def _boot_step(self) -> None:
        lives = self.supervisor.lives
        needed = [life for life in lives.values() if not life.role.optional]
        before_nic = [life for life in needed if life.role.name != "nic"]
        if not self.volumes_ready and not self._making_volumes and all(life.served for life in before_nic):
            self._making_volumes = True
            self._make_volumes(list(self.world.config["volumes"]))
        if all(life.served for life in needed) and self.volumes_ready:
            self.tell_init({"booted": self.greeting()})  # told twice over a death here; init listens once
            self.set(ServiceWord.BOOTED, 1)
            return
        for life in lives.values():
            self.supervisor.decide(life)

    def _make_volumes(self, wanted: list[dict[str, Any]]) -> None:
        present = {volume["name"]: volume for volume in volumes(self.world)}
        while wanted:
            volume = wanted.pop(0)
            found = present.get(volume["name"])
            if volume.get("if_none") and present:
                continue
            if found is None:
                message = {
                    "call": "volume-create",
                    "name": volume["name"],
                    "size_bytes": volume["size_bytes"],
                    "read_only": volume["read_only"],
                    "threshold": volume["threshold"],
                    "tier_threshold": volume["tier_threshold"],
                }
                made = partial(self._volume_made, volume, wanted)
                self.calls.call("dedup", message, made, CALL_TIMEOUT_S)
                return
            if found["size_bytes"] != volume["size_bytes"]:
                log.warning(
                    "volume %r exists with %d bytes, the configuration says %d: left as it is (atoll volume resize)",
                    volume["name"],
                    found["size_bytes"],
                    volume["size_bytes"],
                )
            for key in ("threshold", "tier_threshold"):
                if volume[key] not in (0, found[key]):
                    log.warning(
                        "volume %r has %s %d, the configuration says %d: left as it is (atoll volume set)",
                        volume["name"],
                        key,
                        found[key],
                        volume[key],
                    )
        self.volumes_ready = True
        self._boot_step()

    def _volume_made(self, volume: dict[str, Any], rest: list[dict[str, Any]], answer: dict[str, Any]) -> None:
        if not answer.get("ok"):
            self._give_up(f"volume {volume['name']!r} cannot be made: {answer.get('error')}")
            return
        log.info("volume %r made, %d bytes", volume["name"], volume["size_bytes"])
        self._make_volumes(rest)

    def greeting(self) -> list[str]:
        """What the operator reads when all is ready: where clients go, and three lines to try."""
        names = [volume["name"] for volume in volumes(self.world)] or [""]
        found = [uri for name in names for uri in uris(self.world.listeners, name)]
        lines = [f"atoll serves {uri}" for uri in found]
        if found:
            first = found[-1]
            lines += [
                "try:  nbdinfo " + _quoted(first),
                "      qemu-img info " + _quoted(first),
                f"      atoll ps --data {_quoted(str(self.world.directory.path))}",
            ]
        return lines

    # --- Stop ---

    def stop(self, reason: str) -> None:
        if self.stopping:
            return
        log.info("stopping: %s", reason)
        self.stopping = True
        self.set(ServiceWord.STOPPING, 1)
        self._begin_stop()

    def _begin_stop(self) -> None:
        self.supervisor.ending = True
        self._stop_since_ns = time.monotonic_ns()
        self.supervisor.loop.at(self._stop_since_ns + SAY_EVERY_NS, self._say)
        self._stop_step()
        self._look_after()

    def waiting_for(self) -> str:
        """What a stop waits for now; empty if there is no stop."""
        if not self.stopping:
            return ""
        life = self._next()
        if life is None:
            return "init to end"
        name = life.role.name
        if name == "dedup" and name in self._asked:
            return "dedup to write out what it holds"
        if name in self._answered:
            return f"process {life.active.pid if life.active else 0} of {name} to end"
        return f"{name} ({life.phase.name.lower()})"

    def _say(self) -> None:
        if not self.finished:
            seconds = (time.monotonic_ns() - self._stop_since_ns) / SECOND
            log.warning("not stopped after %.0f s, waiting for %s", seconds, self.waiting_for())
            self.supervisor.loop.at(time.monotonic_ns() + SAY_EVERY_NS, self._say)

    def _next(self) -> Life | None:
        ordered = (self.supervisor.lives[role.name] for role in table.STOP_ORDER)
        return next((life for life in ordered if life.phase is not Phase.STOPPED), None)

    def _stop_step(self) -> None:
        if not self.stopping or self.finished:
            return
        life = self._next()
        if life is None:
            self._finish()
            return
        name = life.role.name
        if life.phase is Phase.SERVING and name not in self._asked:
            self._asked[name] = time.monotonic_ns()
            incarnation = life.incarnation
            self.calls.call(
                name, {"call": "stop"}, lambda answer: self._stop_answered(life, incarnation, answer), timeout_s=1e9
            )
        elif life.phase is Phase.EMPTY:
            if not life.served or life.role.optional:
                self._set_stopped(life)  # never started, or not needed: nothing to stop
            elif life.crashes >= BOOT_CRASHES:
                self._force(life, f"{name} does not stay alive ({life.last_end})")
            else:
                self.supervisor.decide(life)

    def _stop_answered(self, life: Life, incarnation: int, answer: dict[str, Any]) -> None:
        if answer.get("ok"):
            self._answered[life.role.name] = time.monotonic_ns()
        else:
            self._force(life, f"{life.role.name} did not stop in order: {answer.get('error')}")

    def _look_after(self) -> None:
        """Ends those who do not come to an end by themselves."""
        if self.finished:
            return
        now = time.monotonic_ns()
        life = self._next()
        if life is not None:
            name = life.role.name
            bound_ns = STOP_BOUND_NS.get(name)
            if name in self._answered and now - self._answered[name] > EXIT_BOUND_NS:
                log.warning("%s has stopped but its process does not end: killed", name)
                self._force(life, "", clean=True)
            elif bound_ns is not None and name in self._asked and now - self._asked[name] > bound_ns:
                log.warning("%s does not stop: killed", name)
                self._force(life, "", clean=True)
        self._stop_step()
        if not self.finished:
            self.supervisor.loop.at(time.monotonic_ns() + SECOND // 10, self._look_after)

    def _force(self, life: Life, reason: str, clean: bool = False) -> None:
        if life.role.name in table.KEPT and life.role.name != "nic" and not clean:
            self._clean = False
            self._unclean_reason = reason
        if reason:
            log.error("%s", reason)
        if life.active is not None:
            life.active.send(signal.SIGKILL)
        self._set_stopped(life)

    def _set_stopped(self, life: Life) -> None:
        life.phase = Phase.STOPPED
        life.record(self.rows)
        self.supervisor.loop.at(time.monotonic_ns(), self._stop_step)

    def _finish(self) -> None:
        self.finished = True
        self.supervisor.drop_standbys()
        self.tell_init({"stopped": self._clean, "reason": self._unclean_reason})


def _quoted(word: str) -> str:
    """For a shell, where that is needed."""
    plain = all(character.isalnum() or character in "/:._-" for character in word)
    return word if plain else f"'{word}'"
