"""
The servers that are measured, one file for each library.

Each is called with a kind of server (``protocol``, ``lines``, ``chunks`` or
``oneshot``), listens on a free port of localhost with a backlog of 1024, and prints
the port.
"""

import sys

#: How many clients may wait in the kernel.
BACKLOG = 1024

#: The only address that the servers listen on.
HOST = "127.0.0.1"


def listens_on(port: int) -> None:
    """Say which port a server listens on."""
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
