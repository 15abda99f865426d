"""The supervisor: memory, wiring, the life and death of domains, and the command line."""

if __name__ != "atoll.kernel":
    raise ImportError(f"{__name__!r} is a folder of the package atoll: write 'import atoll.kernel'")
