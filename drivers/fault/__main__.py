"""A domain is started by its supervisor, which hands it memory and descriptors; alone it could do nothing."""

import sys

sys.exit("atoll.drivers.fault takes disk's place in tests: [testing] modules = {disk = 'atoll.drivers.fault'}")
