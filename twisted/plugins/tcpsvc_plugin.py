"""
The ``twistd tcpsvc`` command. Twisted imports this file whenever it lists its
plugins, so nothing else belongs here, least of all the reactor.
"""

from twisted.application.service import ServiceMaker

tcpsvc = ServiceMaker(
    "tcpsvc",
    "tcpsvc.tap",
    "A TCP and UNIX-socket server that runs your handler.",
    "tcpsvc",
)
