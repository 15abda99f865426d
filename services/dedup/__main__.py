"""A domain is started by the kernel of an instance: `atoll serve`. Run by itself, this module says so."""

raise SystemExit("atoll.services.dedup is a domain of a running server; start one with: atoll serve")
