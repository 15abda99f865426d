"""Memory of a whole server: proportional set size of its processes, their page tables, and shared memory as allocated.

- `memory(server)` → `Memory`, bytes: `private` (PSS of what is not shared memory, of all processes), `tables` (page
  tables), `arenas` (blocks of the shared memory objects, once), `total`.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from serverkit import Server


@dataclass(frozen=True)
class Memory:
    private: int
    tables: int
    arenas: int

    @property
    def total(self) -> int:
        return self.private + self.tables + self.arenas

    def __str__(self) -> str:
        parts = {"processes": self.private, "page tables": self.tables, "arenas": self.arenas, "total": self.total}
        return ", ".join(f"{name} {amount / 2**20:.0f} MiB" for name, amount in parts.items())


def processes(server: Server) -> list[int]:
    """init's and those below it."""
    assert server.process is not None
    found, look = [], [server.process.pid]
    while look:
        pid = look.pop()
        found.append(pid)
        children = Path(f"/proc/{pid}/task/{pid}/children")
        look += [int(child) for child in children.read_text().split()] if children.exists() else []
    return found


def memory(server: Server) -> Memory:
    private = tables = 0
    instances = set()
    for pid in processes(server):
        arena = False
        try:
            maps, status = Path(f"/proc/{pid}/smaps").read_text(), Path(f"/proc/{pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile, and has no memory
        for line in maps.splitlines():
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                name = re.search(r"/dev/shm/(atoll-[0-9a-f]+)-", line)
                arena = name is not None
                if name is not None:
                    instances.add(name.group(1))
            elif line.startswith("Pss:") and not arena:
                private += int(line.split()[1]) * 1024
        entry = re.search(r"VmPTE:\s+(\d+)", status)
        tables += int(entry.group(1)) * 1024 if entry is not None else 0  # a zombie has none
    objects = [path for path in Path("/dev/shm").iterdir() if "-".join(path.name.split("-")[:2]) in instances]
    arenas = sum(path.stat().st_blocks * 512 for path in objects)
    return Memory(private, tables, arenas)
