"""A storage driver that errs by rule: for tests it takes disk's place in the table of domains (config testing.modules).

It is the real driver (drivers/disk) with a decision in front of each request (fault.h), so it can be killed like that.
Configuration `testing.fault`, all optional:

    seed = 7
    record = "/path/of/a/file"          what reaches the device, in order (read it with record.py)
    record_accesses = true              only where reads and writes go, not what is written
    [[testing.fault.rules]]             the first that applies to a request decides
    action = "error"                    error, delay, hang, tear, forget, crash (the driver aborts)
    kinds = ["read", "write"]           of read, write, sync, discard; default all
    offset = 0                          bytes of the device that the request must touch; with
    length = 4096                       length 0 (default) all
    skip = 0                            so many matching requests pass first
    count = 1                           then so many meet the fault; 0 (default): all
    probability = 1.0
    errno = "EIO"                       of error; of tear too, where default is success
    ms = 100                            of delay
    bytes = 4096                        of tear: what is still done, a multiple of 512

Control calls, beside those of disk: "fault-set" (rules, seed): replaces the rules; "fault-status": rules with
`matched` and `applied`, bytes of the record; "fault-release": lets go of all that hangs or waits.

After a crash: rules, counts, chance and record go on where the last commit left them.
"""

from __future__ import annotations

import errno
import os
from typing import Any

from atoll.drivers import disk as real
from atoll.drivers.fault._fault import ffi, lib
from atoll.ipc.runtime import CallError

COUNTERS = real.COUNTERS

ACTIONS = {
    "error": lib.FAULT_ERROR,
    "delay": lib.FAULT_DELAY,
    "hang": lib.FAULT_HANG,
    "tear": lib.FAULT_TEAR,
    "forget": lib.FAULT_FORGET,
    "crash": lib.FAULT_CRASH,
}
KINDS = {
    "read": lib.FAULT_READS,
    "write": lib.FAULT_WRITES,
    "sync": lib.FAULT_SYNCS,
    "discard": lib.FAULT_DISCARDS,
}
KEYS = {"action", "kinds", "offset", "length", "skip", "count", "probability", "errno", "ms", "bytes"}


class RuleError(ValueError):
    """A rule that means nothing; the text names it."""


def plan(config: dict[str, Any], role: str = "disk") -> tuple[int, int]:
    return lib.fault_role_bytes(), real.plan(config, role)[1]


def main(context: Any) -> None:
    error = ffi.new("char[256]")
    wanted = context.config["testing"].get("fault", {})
    try:
        rules = parse_rules(wanted.get("rules", []))
        record_fd = -1
        if "record" in wanted:
            record_fd = os.open(wanted["record"], os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except (RuleError, OSError) as problem:
        real.fail(context, f"testing.fault: {problem}")
    disk = lib.disk_create(
        context.domain, context.device_fd, real.passes_discards(context), real.crashed(context), error
    )
    if not disk:
        real.fail(context, ffi.string(error).decode(errors="replace"))
    fault = lib.fault_attach(context.domain, disk, record_fd, bool(wanted.get("record_accesses", False)), error)
    if not fault:
        real.fail(context, ffi.string(error).decode(errors="replace"))
    if record_fd >= 0:
        os.ftruncate(record_fd, lib.fault_record_bytes(fault))  # what a predecessor wrote and did not commit
    if lib.fault_is_fresh(fault):
        lib.fault_set(fault, rules, len(rules), wanted.get("seed", 1))
        context.lib.atoll_domain_commit(context.domain)

    def set_rules(message: dict[str, Any]) -> dict[str, Any]:
        try:
            new = parse_rules(message.get("rules", []))
        except RuleError as problem:
            raise CallError(str(problem)) from None
        lib.fault_set(fault, new, len(new), message.get("seed", 0))
        return {}

    def status(message: dict[str, Any]) -> dict[str, Any]:
        return {"rules": describe(fault), "record_bytes": lib.fault_record_bytes(fault)}

    def release(message: dict[str, Any]) -> dict[str, Any]:
        return {"released": lib.fault_release(fault)}

    handlers: real.Handlers = {"fault-set": set_rules, "fault-status": status, "fault-release": release}
    real.serve(context, disk, lib, ffi, handlers)
    lib.fault_detach(fault)


def describe(fault: Any) -> list[dict[str, Any]]:
    rules = ffi.new("struct fault_rule[]", lib.FAULT_RULE_COUNT)
    names = {number: name for name, number in ACTIONS.items()}
    return [
        {
            "action": names[rules[index].action],
            "matched": int(rules[index].matched),
            "applied": int(rules[index].applied),
        }
        for index in range(lib.fault_rules(fault, rules))
    ]


def parse_rules(rows: Any) -> Any:
    """struct fault_rule[], owned by the caller; RuleError names the rule (counted from 1) and what is wrong with it."""
    if not isinstance(rows, list) or len(rows) > lib.FAULT_RULE_COUNT:
        raise RuleError(f"rules: a list of at most {lib.FAULT_RULE_COUNT} is expected")
    rules = ffi.new("struct fault_rule[]", len(rows))
    for number, (rule, row) in enumerate(zip(rules, rows, strict=True), start=1):
        try:
            _parse(rule, row)
        except (RuleError, TypeError, AttributeError, OverflowError) as problem:
            raise RuleError(f"rule {number}: {problem}") from None
    return rules


def _parse(rule: Any, row: dict[str, Any]) -> None:
    if unknown := sorted(set(row) - KEYS):
        raise RuleError(f"unknown key {unknown[0]!r}")
    action = row.get("action")
    if action not in ACTIONS:
        raise RuleError(f"action {action!r} is none of {', '.join(ACTIONS)}")
    kinds = row.get("kinds", list(KINDS))
    if not set(kinds) <= set(KINDS):
        raise RuleError(f"kinds {kinds!r}: only {', '.join(KINDS)} exist")
    probability = float(row.get("probability", 1.0))
    if not 0 <= probability <= 1:
        raise RuleError(f"probability {probability:g} is not between 0 and 1")
    code = row.get("errno", "EIO" if action == "error" else None)
    if code is not None and not isinstance(getattr(errno, str(code), None), int):
        raise RuleError(f"errno {code!r} is no name of an error")
    number = 0 if code is None else getattr(errno, code)
    rule.action = ACTIONS[action]
    rule.kinds = sum(KINDS[kind] for kind in set(kinds))
    rule.offset_bytes, rule.length_bytes = row.get("offset", 0), row.get("length", 0)
    rule.skip, rule.count = row.get("skip", 0), row.get("count", 0)
    rule.per_million = round(probability * 1_000_000)
    if action == "error":
        rule.argument = number
    elif action == "delay":
        rule.argument = round(float(row.get("ms", 0)) * 1e6)
    elif action == "tear":
        kept = row.get("bytes", 512)
        if kept % 512:
            raise RuleError(f"bytes {kept} is not a multiple of 512")
        rule.argument, rule.error = kept, number
