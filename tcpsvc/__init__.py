"""
A TCP and UNIX-socket server for Twisted, after Jane Street Async's ``Tcp.Server``.
"""

from tcpsvc.drain_options import DrainOptions
from tcpsvc.drain_report import DrainReport
from tcpsvc.errors import BufferAgeLimitExceeded, ConnectionGone, ServerClosed
from tcpsvc.events import Observer
from tcpsvc.factory import ServerFactory
from tcpsvc.handler import log_error
from tcpsvc.interfaces import (
    IConnection,
    IObserver,
    IReader,
    IServer,
    IServerFactory,
    IWriter,
)
from tcpsvc.listener import Listener
from tcpsvc.options import Options, StreamOptions
from tcpsvc.overflow import Reply
from tcpsvc.rate import Rate
from tcpsvc.reader import Reader
from tcpsvc.reasons import Reason
from tcpsvc.server import InetServer, Server, UnixServer
from tcpsvc.service import TcpService
from tcpsvc.snapshot import ConnectionSnapshot
from tcpsvc.where import (
    ALL_ADDRESSES,
    CHOSEN_BY_OS,
    LOCALHOST,
    InetAddress,
    WhereToListen,
)
from tcpsvc.writer import Writer

__version__ = "0.1.0"

__all__ = [
    "ALL_ADDRESSES",
    "CHOSEN_BY_OS",
    "LOCALHOST",
    "BufferAgeLimitExceeded",
    "ConnectionGone",
    "ConnectionSnapshot",
    "DrainOptions",
    "DrainReport",
    "IConnection",
    "IObserver",
    "IReader",
    "IServer",
    "IServerFactory",
    "IWriter",
    "InetAddress",
    "InetServer",
    "Listener",
    "Observer",
    "Options",
    "Rate",
    "Reader",
    "Reason",
    "Reply",
    "Server",
    "ServerClosed",
    "ServerFactory",
    "StreamOptions",
    "TcpService",
    "UnixServer",
    "WhereToListen",
    "Writer",
    "log_error",
]
