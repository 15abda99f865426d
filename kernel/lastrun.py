"""What the last run left in shared memory, as far as it is there and is what its record says.

- `there(last)`    the arenas that hold acknowledged writes, all of them
- `served(last)`   whether the last run had clients to acknowledge anything to

By this the next start takes the arenas over (world.py), and until then nothing else changes the device (offline.py).
"""

import os

from atoll.ipc import objects, physmap
from atoll.ipc._ipc import lib
from atoll.kernel import table
from atoll.kernel.instance import Record, boot_id

LAYOUT_VERSION = int(lib.ATOLL_LAYOUT_VERSION)


def there(last: Record) -> bool:
    wanted = {objects.arena_name(last.instance, role) for role in table.KEPT}
    return last.boot_id == boot_id() and wanted <= set(objects.list_objects(last.instance))


def served(last: Record) -> bool | None:
    """None if an arena is not what the record says, or of another program's layout.

    False: nothing can have been acknowledged, and tables may be half made. The record alone does not tell: when the
    first clients came it may be that it could not be written (a full file system), but then the arenas say so.
    """
    found = [_served(last, role) for role in table.KEPT]
    return None if None in found else last.served or all(found)


def _served(last: Record, role: str) -> bool | None:
    expected = last.arenas.get(role)
    if expected is None:
        return None
    descriptor = objects.open_read_only(objects.arena_name(last.instance, role))
    try:
        if objects.size_of(descriptor) != expected["bytes"]:
            return None
        with physmap.Elsewhere(descriptor, expected["bytes"]) as arena:
            header = arena.header
            if (
                header.magic != lib.ATOLL_ARENA_MAGIC
                or header.layout_version != LAYOUT_VERSION
                or header.role != table.ROLES[role].number
                or header.instance != last.instance
                or header.arena_bytes != expected["bytes"]
                or header.role_bytes != expected["role_bytes"]
                or header.buffer_bytes != expected["buffer_bytes"]
            ):
                return None
            return bool(header.serving_ns)
    finally:
        os.close(descriptor)
