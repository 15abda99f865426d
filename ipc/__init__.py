"""The ground: shared memory, rings, buffers, and the messages that cross between domains."""

if __name__ != "atoll.ipc":
    raise ImportError(f"{__name__!r} is a folder of the package atoll: write 'import atoll.ipc'")
