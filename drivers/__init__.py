"""Domains that own a device: network sockets and storage."""

if __name__ != "atoll.drivers":
    raise ImportError(f"{__name__!r} is a folder of the package atoll: write 'import atoll.drivers'")
