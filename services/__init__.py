"""Domains that own a protocol or a policy: nbd, dedup."""

if __name__ != "atoll.services":
    raise ImportError(f"{__name__!r} is a folder of the package atoll: write 'import atoll.services'")
