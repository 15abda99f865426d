"""The verbs of the control socket. Arguments are checked here; what is not said here is refused by name.

status                                  volumes, space, write log, engines, counters
ps                                      {"domains": [rows], "stopping": text}
kill      role, signal                  {role, signal, pid, new_pid, detect_ms, serving_ms}
                                        (the last three None: the signal ends nobody)
volume-list                             {"volumes": [...]}
volume-create name, size_bytes, read_only, threshold, tier_threshold   volume-set name, threshold, tier_threshold
volume-resize name, size_bytes          volume-delete name, force
trace     action: arm                   {"trace": number}
          action: collect               {"domains": {role: {"incarnation", "records": 64 bytes each}}}
          action: disarm
crash-point name ("" disarms)           only with testing.crash_points
call      role, message, timeout_s      {"answer": the domain's}
stop                                    at once; it is over when the process of init has ended
"""

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from atoll.ipc import physmap
from atoll.ipc.crashpoint import point_hash
from atoll.kernel import process, table, views
from atoll.kernel.calls import Calls
from atoll.kernel.control import Refused, Reply
from atoll.kernel.life import Life, Phase
from atoll.kernel.listeners import uris
from atoll.kernel.records import ServiceWord
from atoll.kernel.service import Service
from atoll.kernel.supervisor import MS, SECOND, Supervisor
from atoll.kernel.world import World

CALL_TIMEOUT_S = 10.0
VOLUME_TIMEOUT_S = 60.0
KILL_TIMEOUT_NS = 30 * SECOND
# A trace whose client has gone away does not slow the service for ever.
TRACE_BOUND_NS = 600 * SECOND


class Verbs:
    def __init__(self, world: World, domain: Any, supervisor: Supervisor, calls: Calls, service: Service) -> None:
        self.world = world
        self.domain = domain
        self.supervisor = supervisor
        self.calls = calls
        self.service = service
        self._trace_since: dict[str, int] = {}
        self._verbs: dict[str, Callable[[dict[str, Any], Reply], None]] = {
            "status": self._status,
            "ps": self._ps,
            "kill": self._kill,
            "volume-list": self._volume_list,
            "volume-create": self._volume_create,
            "volume-set": self._volume_set,
            "volume-resize": self._volume_resize,
            "volume-delete": self._volume_delete,
            "trace": self._trace,
            "crash-point": self._crash_point,
            "call": self._call,
            "stop": self._stop,
        }
        if armed := int(domain.self.trace_armed):  # by a predecessor, whose timer has died with it
            self._expire_trace(armed)

    def answer(self, verb: str, arguments: dict[str, Any], reply: Reply) -> None:
        handler = self._verbs.get(verb)
        if handler is None:
            raise Refused(f"no verb {verb!r}; there are {', '.join(self._verbs)}")
        handler(arguments, reply)

    # --- Looking ---

    def _status(self, arguments: dict[str, Any], reply: Reply) -> None:
        answers: dict[str, dict[str, Any]] = {}

        def done(role: str, answer: dict[str, Any]) -> None:
            answers[role] = answer
            if len(answers) == len(table.DOMAINS):
                reply(self._status_of(answers))

        for role in table.DOMAINS:
            life = self.supervisor.lives[role.name]
            if role.optional and life.phase is not Phase.SERVING:
                done(role.name, {"ok": False, "error": life.reason or f"{role.name} does not serve ({life.last_end})"})
                continue
            # A domain that is being replaced has its own timeout; the others do not wait for it in turn.
            self.calls.call(role.name, {"call": "status"}, partial(done, role.name), 5.0)

    def _status_of(self, answers: dict[str, dict[str, Any]]) -> dict[str, Any]:
        world = self.world
        counted = views.counters(world)
        dedup = answers["dedup"]
        warnings = [f"{role}: {answer.get('error')}" for role, answer in answers.items() if not answer.get("ok")]
        if world.fast_error:
            warnings.append(world.fast_error)
        if world.engines.get("nic") == "sockets":
            warnings.append("without io_uring a kill of nic drops its connections")
        if failed := (dedup.get("log") or {}).get("failed_blocks"):
            warnings.append(
                f"{failed} acknowledged blocks cannot be stored (the log says why): until they can, FLUSH fails, and"
                " when the write log is full, writes wait"
            )
        document = {
            "instance": f"{world.instance:016x}",
            "data": str(world.directory.path),
            "state": "stopping" if self.service.stopping else "serving" if self.service.booted else "starting",
            "adopted": world.adopted,
            "uptime_s": round((time.monotonic_ns() - world.started_ns) / SECOND, 3),
            "uris": [uri for volume in views.volumes(world) for uri in volume["uris"]] or uris(world.listeners, ""),
            "volumes": views.volumes(world),
            "dedup": {key: dedup.get(key) for key in ("logical_bytes", "stored_bytes", "shared_bytes", "ratio")},
            "copies": {
                "inside_bytes": sum(names.get("copied_inside_bytes", 0) for names in counted.values()),
                "between_bytes": sum(names.get("copied_between_bytes", 0) for names in counted.values()),
            },
            "device": None
            if world.device is None
            else {"path": world.device.path, "bytes": world.config["device_bytes"], "direct": world.device.direct},
            "fast_device": None
            if world.fast_device is None
            else {
                "path": world.fast_device.path,
                "bytes": world.config["fast_device_bytes"],
                "direct": world.fast_device.direct,
            },
            "engines": world.engines,
            "cpu_latency": world.latency.status(answers["nic"]),
            "counters": counted,
            "warnings": warnings,
            "domains": {
                role: {key: value for key, value in answer.items() if key not in ("ok", "v")}
                for role, answer in answers.items()
            },
        }
        for name in ("space", "log", "cache", "scrub", "tier"):
            if isinstance(dedup.get(name), dict):
                document[name] = dedup[name]
        scrub = dedup.get("scrub")
        if isinstance(scrub, dict) and scrub.get("state") == "never":
            document["scrub"] = scrub | (world.directory.last_scrub() or {})
        return document

    def _ps(self, arguments: dict[str, Any], reply: Reply) -> None:
        incarnation, starts = int(self.domain.incarnation), self.supervisor.zygote_starts
        rows = [
            views.process_row("init", views.this_process(self.world.init_pid), 1, 0),
            views.process_row("kernel", views.this_process(os.getpid()), incarnation, incarnation - 1),
            views.process_row("zygote", self.supervisor.zygote, starts, max(0, starts - 1)),
        ]
        for role in table.STOP_ORDER:
            life = self.supervisor.lives[role.name]
            rows.append(views.domain_row(life, self.service.may_start(life)))
        reply({"domains": rows, "stopping": self.service.waiting_for()})

    def _volume_list(self, arguments: dict[str, Any], reply: Reply) -> None:
        reply({"volumes": views.volumes(self.world)})

    # --- Changing ---

    def _volume_create(self, arguments: dict[str, Any], reply: Reply) -> None:
        message = {
            "name": _text(arguments, "name"),
            "size_bytes": _number(arguments, "size_bytes"),
            "read_only": bool(arguments.get("read_only", False)),
            **_thresholds(arguments),
        }
        self._forward("dedup", {"call": "volume-create", **message}, reply, VOLUME_TIMEOUT_S)

    def _volume_set(self, arguments: dict[str, Any], reply: Reply) -> None:
        message = {"name": _text(arguments, "name"), **_thresholds(arguments)}
        self._forward("dedup", {"call": "volume-set", **message}, reply, VOLUME_TIMEOUT_S)

    def _volume_resize(self, arguments: dict[str, Any], reply: Reply) -> None:
        message = {"name": _text(arguments, "name"), "size_bytes": _number(arguments, "size_bytes")}
        self._forward("dedup", {"call": "volume-resize", **message}, reply, VOLUME_TIMEOUT_S)

    def _volume_delete(self, arguments: dict[str, Any], reply: Reply) -> None:
        message = {"name": _text(arguments, "name"), "force": bool(arguments.get("force", False))}
        self._forward("dedup", {"call": "volume-delete", **message}, reply, VOLUME_TIMEOUT_S)

    def _forward(self, role: str, message: dict[str, Any], reply: Reply, timeout_s: float) -> None:
        if self.service.stopping:
            raise Refused("the service stops")
        self.calls.call(role, message, reply, timeout_s)

    def _call(self, arguments: dict[str, Any], reply: Reply) -> None:
        role, message = self._life(arguments).role.name, arguments.get("message")
        if not isinstance(message, dict):
            raise Refused("call: `message` is a map")
        if message.get("call") == "stop":
            raise Refused("call: a domain is stopped by stopping the service; to replace it, kill it")
        timeout_s = float(arguments.get("timeout_s", CALL_TIMEOUT_S))

        def done(answer: dict[str, Any]) -> None:
            if answer.get("ok"):
                reply({"answer": answer})
            else:
                reply({"ok": False, "error": str(answer.get("error"))})

        self._forward(role, message, done, timeout_s)

    def _stop(self, arguments: dict[str, Any], reply: Reply) -> None:
        self.service.stop("asked by a control client")
        reply({"waiting_for": self.service.waiting_for()})

    # --- Killing ---

    def _kill(self, arguments: dict[str, Any], reply: Reply) -> None:
        if arguments.get("role") in ("kernel", "zygote", "init"):
            raise Refused(f"kill {arguments['role']} by its pid: it stands in ps")
        life = self._life(arguments, "kernel", "zygote")  # as seen from the command line
        name = arguments.get("signal", "KILL")
        try:
            number = signal.Signals["SIG" + str(name).upper().removeprefix("SIG")]
        except KeyError:
            raise Refused(f"no such signal: {name!r}") from None
        victim = life.active
        if victim is None or life.phase not in (Phase.SERVING, Phase.RECOVERING):
            raise Refused(f"{life.role.name} is not serving now ({views.state_of(life, True)})")
        pid = victim.pid
        harmless = process.outlives(pid, number)
        killed = {"role": life.role.name, "signal": number.name.removeprefix("SIG"), "pid": pid}
        started_ns = time.monotonic_ns()
        if not victim.send(number):
            raise Refused(f"{life.role.name}, process {pid}, ended by itself a moment ago")
        if harmless:
            reply(killed | {"new_pid": None, "detect_ms": None, "serving_ms": None})
            return
        life.detected_ns = 0
        finished = False

        def done(served: Life) -> None:
            nonlocal finished
            if finished or served.active is None:
                return
            finished = True
            header = physmap.header(life.role.number)
            reply(
                killed
                | {
                    "new_pid": served.active.pid,
                    "detect_ms": round((served.detected_ns - started_ns) / MS, 3) if served.detected_ns else None,
                    "serving_ms": round((int(header.serving_ns) - started_ns) / MS, 3),
                }
            )

        def late() -> None:
            nonlocal finished
            if not finished:
                finished = True
                state = views.state_of(life, True)
                reply(
                    {
                        "ok": False,
                        "error": f"{life.role.name} has no successor {KILL_TIMEOUT_NS // SECOND} s after {number.name}"
                        f" (state {state}; without work to do a stopped process is not missed; CONT lets it go on)",
                    }
                )

        life.waiting_kills.append(done)
        self.supervisor.loop.at(started_ns + KILL_TIMEOUT_NS, late)

    # --- Tests and proofs ---

    def _trace(self, arguments: dict[str, Any], reply: Reply) -> None:
        action, header = arguments.get("action"), self.domain.self
        if action == "arm":
            number = self.service.words[ServiceWord.TRACE] + 1
            self.service.set(ServiceWord.TRACE, number)
            self._trace_since = {role.name: views.trace_position(role.name) for role in table.DOMAINS}
            header.trace_armed = number
            self._expire_trace(number)
            reply({"trace": number})
        elif action == "collect":
            reply(
                {
                    "domains": {
                        role.name: {
                            "incarnation": self.supervisor.lives[role.name].incarnation,
                            "records": views.trace_records(role.name, self._trace_since.get(role.name, 0)),
                        }
                        for role in table.DOMAINS
                    }
                }
            )
        elif action == "disarm":
            if arguments.get("trace") in (None, int(header.trace_armed)):
                header.trace_armed = 0
            reply({})
        else:
            raise Refused(f"trace: action is arm, collect or disarm, not {action!r}")

    def _expire_trace(self, number: int) -> None:
        """While a trace is armed nothing is answered from memory and no write is posted: not for ever."""
        header = self.domain.self

        def expire() -> None:
            if header.trace_armed == number:
                header.trace_armed = 0

        self.supervisor.loop.at(time.monotonic_ns() + TRACE_BOUND_NS, expire)

    def _crash_point(self, arguments: dict[str, Any], reply: Reply) -> None:
        if not self.world.config["testing"]["crash_points"]:
            raise Refused("crash points are for tests: testing.crash_points is false")
        name, header = arguments.get("name"), self.domain.self
        if not isinstance(name, str):
            raise Refused("crash-point: `name` is text; an empty one disarms")
        header.crash_point = 0
        if name:
            try:
                armed = point_hash(name)
            except ValueError as error:
                raise Refused(str(error)) from None
            header.crash_sequence += 1
            header.crash_point = armed
        reply({"sequence": int(header.crash_sequence)})

    def _life(self, arguments: dict[str, Any], *others: str) -> Life:
        """Of the domain named; a refusal names the `others` too."""
        name = arguments.get("role")
        life = self.supervisor.lives.get(name) if isinstance(name, str) else None
        if life is None:
            raise Refused(f"no role {name!r}; there are {', '.join([*self.supervisor.lives, *others])}")
        return life


def _text(arguments: dict[str, Any], key: str) -> str:
    value = arguments.get(key)
    if not isinstance(value, str):
        raise Refused(f"`{key}` is text")
    return value


def _thresholds(arguments: dict[str, Any]) -> dict[str, int]:
    """0: not said."""
    return {key: _number({key: 0, **arguments}, key) for key in ("threshold", "tier_threshold")}


def _number(arguments: dict[str, Any], key: str) -> int:
    value = arguments.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise Refused(f"`{key}` is a whole number, 0 or more")
    return value
