"""An offline checker of the store: a second implementation of docs/format.md, in Python and numpy.

- layout.py   what lies where on the device; all that depends on the format's version
- image.py    blocks of a file, a block device, or memory
- reader.py   superblock, log replay, tree of pages, both copies of each
- audit.py    everything that is said twice must agree; stored blocks against their fingerprints
- repair.py   what follows from the rest is put right; rebuild.py: pages that are lost in both copies
"""
