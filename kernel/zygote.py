"""The zygote: has everything imported and every arena mapped read-only, and forks a standby when asked.

- `run(world)`   never returns

Single-threaded, so that forking it is sound. A standby is forked twice over, so that it becomes a child of init, which
reaps it and with which it dies.

After a crash: running standbys and domains are not concerned; init forks another zygote, which says hello, and the
kernel asks again for what it still lacks.
"""

import gc
import logging
import os
import sys
from typing import NoReturn

from atoll.ipc import objects, physmap
from atoll.kernel import messages, process, standby, table
from atoll.kernel.world import World

log = logging.getLogger("atoll.zygote")


def run(world: World) -> NoReturn:
    process.name_this("atoll-zygote")
    process.die_with_parent(world.init_pid)
    assert world.zygote_channel is not None
    channel = world.zygote_channel[1]
    for role in table.DOMAINS:
        table.module_of(role, world.config)
    map_read_only(world)
    _look_up_c()
    gc.collect()
    gc.freeze()  # what is there stays: a collection in a child would touch, and so copy, all of it
    pid = os.getpid()
    own_start_time = process.start_time(pid)
    itself = {"pid": pid, "start_time": own_start_time, "starts": world.zygote_starts}
    messages.send(channel, {"hello": True, **itself})
    while True:
        try:
            received = messages.receive(channel, wait=True)
        except messages.EndOfChannel:
            os._exit(0)
        assert received is not None
        message, _ = received
        if "fork" in message:
            role_name = message["fork"]
            child, start_time = fork_standby(world, role_name)
            answer = {"role": role_name, "pid": child, "start_time": start_time}
        else:
            answer = {"synced": message["sync"], **itself}
        channel.setblocking(True)
        messages.send(channel, answer)


def _look_up_c() -> None:
    """Functions of a C extension become objects when they are first named: here, once for all standbys."""
    for module in list(sys.modules.values()):
        lib = getattr(module, "lib", None)
        if type(lib).__name__ == "Lib" and getattr(module, "__name__", "").startswith("atoll."):
            for name in dir(lib):
                getattr(lib, name)


def map_read_only(world: World) -> None:
    """All arenas at their addresses (I2); the descriptors are not kept."""
    for name, arena in world.arenas.items():
        descriptor = objects.open_read_only(objects.arena_name(world.instance, name))
        try:
            physmap.map_arena(table.ROLES[name].number, descriptor, arena.arena_bytes)
        finally:
            os.close(descriptor)


def fork_standby(world: World, role_name: str) -> tuple[int, int]:
    """Pid and start time of a new standby, a child of init already."""
    read_end, write_end = os.pipe()
    between = os.fork()
    if between == 0:
        child = os.fork()
        if child == 0:
            os.close(read_end)
            os.close(write_end)
            standby.run(world, role_name)
        os.write(write_end, child.to_bytes(8, "little"))
        os._exit(0)
    os.close(write_end)
    os.waitpid(between, 0)  # from now on its child is init's
    data = os.read(read_end, 8)
    os.close(read_end)
    child = int.from_bytes(data, "little")
    return child, process.start_time(child)
