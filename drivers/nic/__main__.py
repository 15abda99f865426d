"""A domain is started by its supervisor, which hands it memory and descriptors; alone it could do nothing."""

import sys

sys.exit("atoll.drivers.nic is a domain of Atoll: start the server with 'atoll serve'")
