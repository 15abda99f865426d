"""The store as a state machine beside a plain dictionary: random steps, deaths of the process, power loss.

The C rig (tests/c/store_rig.h) plays device and datapath; the oracle is here: the values of all keys after each change
that the device may know. After power loss the store must hold one of those from the last finished sync on.
"""

import subprocess
from pathlib import Path
from typing import Any

import cffi
import pytest
import test_store_c
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

ROOT = Path(__file__).resolve().parent.parent
KEYS = 60  # of volume 0; the rig's keys 0..199 are 5 blocks apart
ffi = cffi.FFI()
ffi.cdef("""
const char *rig_error(void);
int rig_start(uint64_t seed, uint64_t blocks, uint64_t frames);
void rig_end(void);
int rig_write(uint64_t key, uint64_t content);
int rig_unmap(uint64_t key, int promise);
int rig_step(void);
int rig_io(void);
int rig_settle(void);
int rig_die(void);
int rig_check(void);
int rig_destage(void);
int rig_checkpoint(void);
int64_t rig_sync(void);
int64_t rig_synced(void);
int rig_power_loss(uint64_t mode);
int64_t rig_get(uint64_t key);
""")


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Any:
    library = tmp_path_factory.mktemp("rig") / "librig.so"
    flags = ["-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-Wno-unused-function", "-Wno-clobbered"]
    flags += ["-DSTORE_RIG_LIBRARY"]
    command = ["gcc", *test_store_c.FLAGS, *flags, "-o", str(library), str(test_store_c.SOURCE), *test_store_c.needs()]
    subprocess.run(command, cwd=ROOT, check=True)
    return ffi.dlopen(str(library))


keys = st.integers(0, KEYS - 1)


def machine(lib: Any) -> type[RuleBasedStateMachine]:
    def done(result: int) -> int:
        assert result >= 0, ffi.string(lib.rig_error()).decode()
        return result

    class Store(RuleBasedStateMachine):
        @initialize(
            seed=st.integers(0, 1 << 32), blocks=st.sampled_from([1024, 2048, 2500]), frames=st.integers(128, 200)
        )
        def start(self, seed: int, blocks: int, frames: int) -> None:
            done(lib.rig_start(seed, blocks, frames))
            self.started = True
            self.now = [0] * KEYS
            self.history = [self.now]  # what the device may hold: the states since the last finished sync
            self.tickets: list[tuple[int, int]] = []  # ticket, index into history

        def look(self) -> None:
            """What the store says that it holds now."""
            found = [done(lib.rig_get(key)) for key in range(KEYS)]
            changed = [key for key in range(KEYS) if found[key] != self.now[key]]
            assert len(changed) <= 1, "one change at a time"
            if changed:
                self.history.append(found)
                self.now = found

        @rule(key=keys, content=st.integers(2, 12))
        def write(self, key: int, content: int) -> None:
            """Logged, placed or shared: the persistent value changes once, when it is destaged."""
            done(lib.rig_write(key, content))
            assert [done(lib.rig_get(each)) for each in range(KEYS)] == self.now
            while done(lib.rig_destage()):
                self.look()

        @rule(key=keys, promise=st.booleans())
        def unmap(self, key: int, promise: bool) -> None:
            done(lib.rig_unmap(key, promise))
            self.look()

        @rule(count=st.integers(1, 5))
        def step(self, count: int) -> None:
            for _ in range(count):
                done(lib.rig_step())
                done(lib.rig_io())

        @rule()
        def checkpoint(self) -> None:
            done(lib.rig_checkpoint())

        @rule()
        def sync(self) -> None:
            self.tickets.append((lib.rig_sync(), len(self.history) - 1))

        @rule()
        def settle(self) -> None:
            done(lib.rig_settle())
            assert all(ticket <= lib.rig_synced() for ticket, _ in self.tickets)

        @rule()
        def die(self) -> None:
            done(lib.rig_die())

        @rule(mode=st.integers(0, 6))
        def power_loss(self, mode: int) -> None:
            synced = max((at for ticket, at in self.tickets if ticket <= lib.rig_synced()), default=0)
            done(lib.rig_power_loss(mode))
            found = [done(lib.rig_get(key)) for key in range(KEYS)]
            assert found in self.history[synced:]
            self.now = found
            self.history = [found]
            self.tickets = []

        @invariant()
        def consistent(self) -> None:
            if getattr(self, "started", False):
                done(lib.rig_check())
                assert [done(lib.rig_get(key)) for key in range(KEYS)] == self.now

        def teardown(self) -> None:
            if getattr(self, "started", False):
                lib.rig_end()

    return Store


def test_state_machine(rig: Any) -> None:
    chosen = settings(
        max_examples=60, stateful_step_count=40, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(machine(rig), settings=chosen)
