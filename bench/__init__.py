"""Measurements, and the programs they are compared with."""

if __name__ != "atoll.bench":
    raise ImportError(f"{__name__!r} is a folder of the package atoll: write 'import atoll.bench'")
