"""
Where a server listens: a value, which has opened nothing. Two that say the same are
equal, and each prints as what was asked for. How a socket is opened is in
:mod:`tcpsvc.sockets`.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import stat
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, Generic, TypeVar, cast

from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.endpoints import serverFromString
from twisted.internet.interfaces import IAddress, IStreamServerEndpoint

from tcpsvc.address_text import address_text, one_line
from tcpsvc.sockets import (
    ListeningSocket,
    adopt,
    close_given,
    listen_on_given,
    open_inet,
    open_unix,
)
from tcpsvc.unix_paths import check_unix_path

InetAddress = IPv4Address | IPv6Address
# Covariant: a list of places of several kinds is one of places of a common kind.
AddressT = TypeVar("AddressT", bound=IAddress, covariant=True)  # noqa: PLC0105
ListeningOnT = TypeVar("ListeningOnT", covariant=True)  # noqa: PLC0105

#: Every IPv4 address of this host; with ``dual_stack=True`` every IPv6 one too.
ALL_ADDRESSES: Final = "0.0.0.0"
#: The IPv4 loopback address: only this host can connect.
LOCALHOST: Final = "127.0.0.1"
#: A free port, chosen by the operating system.
CHOSEN_BY_OS: Final = 0


class WhereToListen(Generic[AddressT, ListeningOnT]):
    """
    Where to listen (spec W). Made by the class methods below; the type
    parameters are the clients' address type and the type of
    :attr:`tcpsvc.Server.listening_on`.
    """

    __slots__ = ()

    #: Whether ``backlog`` is that of its socket.
    takes_backlog: ClassVar[bool] = False

    def __str__(self) -> str:
        return address_text(self.address)

    def __repr__(self) -> str:
        return f"<WhereToListen {self}>"

    @property
    def address(self) -> IAddress | None:
        """
        The address as it was asked for, as a Twisted address; ``None`` where
        only an endpoint, or a descriptor, knows it.
        """
        return None

    @staticmethod
    def bind_to(
        address: str,
        port: int,
        *,
        reuseaddr: bool = True,
        reuseport: bool = False,
        dual_stack: bool = False,
    ) -> WhereToListen[InetAddress, int]:
        """
        An address and a port (Async's ``bind_to``; spec W1 to W5).

        :param address: an IPv4 or IPv6 literal, :data:`ALL_ADDRESSES` or
            :data:`LOCALHOST`. Names are not looked up.
        :param port: 1 to 65535, or :data:`CHOSEN_BY_OS` (0).
        :param reuseaddr: set SO_REUSEADDR (default true), so that a restarted
            server need not wait for old connections' TIME_WAIT.
        :param reuseport: set SO_REUSEPORT (default false), so that several
            processes can listen on the same port.
        :param dual_stack: serve IPv4 clients too on :data:`ALL_ADDRESSES` or
            ``"::"``; they are shown with their IPv4 addresses.
        :raises ValueError: no literal, no port number, or dual stack on an
            address of one family.
        """
        if not isinstance(address, str):
            raise TypeError(f"address={address!r} is not a str")
        try:
            ipaddress.ip_address(address)
        except ValueError:
            raise ValueError(
                f"address={address!r} is not an IPv4 or IPv6 literal; for a host "
                "name use WhereToListen.of_endpoint('tcp:PORT:interface=HOST')"
            ) from None
        if isinstance(port, bool) or not isinstance(port, int):
            raise TypeError(f"port={port!r} is not an int")
        if not 0 <= port <= 65535:
            raise ValueError(f"port={port} is not in 0..65535")
        if dual_stack:
            if address not in (ALL_ADDRESSES, "::"):
                raise ValueError(
                    f"dual_stack=True with address={address!r}: only ALL_ADDRESSES "
                    "or '::' can serve both families"
                )
            address = "::"
        return _Inet(address, port, reuseaddr, reuseport, dual_stack)

    @staticmethod
    def of_port(port: int) -> WhereToListen[InetAddress, int]:
        """
        A port on every IPv4 address of this host.

        :param port: 1 to 65535, or 0 for one chosen by the operating system.
        :raises ValueError: it is not in 0..65535.
        """
        return WhereToListen.bind_to(ALL_ADDRESSES, port)

    @staticmethod
    def of_port_chosen_by_os() -> WhereToListen[InetAddress, int]:
        """A free port on every IPv4 address, chosen by the operating system."""
        return WhereToListen.bind_to(ALL_ADDRESSES, CHOSEN_BY_OS)

    @staticmethod
    def of_port_chosen_by_os_no_reuseaddr() -> WhereToListen[InetAddress, int]:
        """
        The same without SO_REUSEADDR: a port whose old connections are still in
        TIME_WAIT is not chosen.
        """
        return WhereToListen.bind_to(ALL_ADDRESSES, CHOSEN_BY_OS, reuseaddr=False)

    @staticmethod
    def of_file(
        path: str | os.PathLike[str], *, mode: int | None = None
    ) -> WhereToListen[UNIXAddress, str]:
        """
        A UNIX socket (spec W6, W9). A stale socket is replaced, a live one is an
        error; the path is made absolute when it is bound, and unlinked when the
        server closes.

        :param path: at most 107 bytes.
        :param mode: the socket's permissions, e.g. ``0o600``; by default the
            process's umask decides.
        :raises ValueError: the path is empty, too long, or holds a NUL; the
            mode is not in 0..0o7777.
        """
        name = os.fspath(path)
        if not isinstance(name, str):
            raise TypeError(f"path={name!r} is not a str")
        check_unix_path(name)
        if mode is not None and not 0 <= mode <= 0o7777:
            raise ValueError(f"mode={mode!r} is not in 0..0o7777")
        return _Unix(name, mode)

    @staticmethod
    def of_endpoint(
        endpoint: str | IStreamServerEndpoint,
    ) -> WhereToListen[IAddress, IAddress]:
        """
        Any endpoint of Twisted's, or its description (``"tls:443:..."``,
        ``"systemd:domain=INET:index=0"``, ...). The backlog and the socket's
        options are the endpoint's own; ``backlog=`` does not reach it.

        :param endpoint: a description as :func:`serverFromString
            <twisted.internet.endpoints.serverFromString>` takes it (parsed when
            the server is created), or an :class:`IStreamServerEndpoint
            <twisted.internet.interfaces.IStreamServerEndpoint>`.
        :raises TypeError: it is neither.
        """
        if not isinstance(endpoint, str) and not IStreamServerEndpoint.providedBy(
            endpoint
        ):
            raise TypeError(
                f"endpoint={endpoint!r} is neither a description nor an "
                "IStreamServerEndpoint"
            )
        return EndpointPlace(endpoint)

    @staticmethod
    def of_fd(fd: int, *, own: bool = False) -> WhereToListen[IAddress, IAddress]:
        """
        A descriptor that listens already, such as one inherited from systemd or
        from a parent process. It is never unlinked or shut down, since others
        may share it; it is set to non-blocking, for all who share it.

        :param fd: the descriptor's number.
        :param own: take it over and close it in the end; by default it is
            duplicated and the caller's stays open.
        :raises ValueError: the number is negative. Whether it listens is looked
            at when the server is created.
        """
        if isinstance(fd, bool) or not isinstance(fd, int):
            raise TypeError(f"fd={fd!r} is not an int")
        if fd < 0:
            raise ValueError(f"fd={fd} is negative")
        return _Descriptor(fd, own)


class SocketPlace(WhereToListen[AddressT, ListeningOnT]):
    """A place that becomes a listening socket at once, without an endpoint."""

    __slots__ = ()
    takes_backlog: ClassVar[bool] = True

    def open(self, backlog: int, given: socket.socket | None = None) -> ListeningSocket:
        """
        Bind and listen.

        :param given: the caller's own unbound socket to use (spec W7). It is
            closed if this fails.
        :raises CannotListenError: the kernel refused.
        :raises ValueError: ``given`` is bound, of another family or no stream.
        """
        raise NotImplementedError  # pragma: no cover

    def listening_on(self, address: IAddress) -> ListeningOnT:
        """What :attr:`tcpsvc.Server.listening_on` says, given the real address."""
        return cast(ListeningOnT, address)

    @property
    def leaves_port_to_os(self) -> bool:
        """Whether it is an inet place with port 0."""
        return False

    def with_port(self, port: int) -> SocketPlace[AddressT, ListeningOnT]:
        """The same inet place with another port."""
        raise NotImplementedError  # pragma: no cover

    def again(self, address: IAddress) -> SocketPlace[AddressT, ListeningOnT]:
        """
        Where to listen on the very same address once more (spec Z4).

        :param address: where it listens now.
        :raises ValueError: that cannot be promised; it says why.
        """
        raise NotImplementedError  # pragma: no cover


@dataclass(frozen=True, slots=True, repr=False)
class _Inet(SocketPlace[InetAddress, int]):
    host: str
    port: int
    reuseaddr: bool
    reuseport: bool
    dual_stack: bool

    @property
    def address(self) -> InetAddress:
        if ":" in self.host:
            return IPv6Address("TCP", self.host, self.port)
        return IPv4Address("TCP", self.host, self.port)

    def open(self, backlog: int, given: socket.socket | None = None) -> ListeningSocket:
        if given is not None:
            return listen_on_given(given, (self.host, self.port), backlog)
        made = open_inet(
            self.host,
            self.port,
            backlog=backlog,
            reuseaddr=self.reuseaddr,
            reuseport=self.reuseport,
            dual_stack=self.dual_stack,
        )
        return ListeningSocket(made, maps_ipv4=self.dual_stack)

    def listening_on(self, address: IAddress) -> int:
        return cast(InetAddress, address).port

    @property
    def leaves_port_to_os(self) -> bool:
        return self.port == CHOSEN_BY_OS

    def with_port(self, port: int) -> _Inet:
        return replace(self, port=port)

    def again(self, address: IAddress) -> _Inet:
        if not self.reuseaddr:
            raise ValueError(
                "without reuseaddr its own connections keep the port from being "
                "bound again"
            )
        return self.with_port(cast(InetAddress, address).port)


@dataclass(frozen=True, slots=True, repr=False)
class _Unix(SocketPlace[UNIXAddress, str]):
    path: str
    mode: int | None

    @property
    def address(self) -> UNIXAddress:
        return UNIXAddress(self.path)

    def open(self, backlog: int, given: socket.socket | None = None) -> ListeningSocket:
        if given is not None:
            return listen_on_given(given, self.path, backlog, self.mode)
        made, bound = open_unix(self.path, backlog=backlog, mode=self.mode)
        return ListeningSocket(made, path=bound)

    def listening_on(self, address: IAddress) -> str:
        return self.path

    def again(self, address: IAddress) -> _Unix:
        # Absolute, and with the permissions that it has: directory and umask may
        # have changed since, as those of a daemon do.
        path = os.fsdecode(cast(Any, address).name)
        try:
            mode = stat.S_IMODE(os.lstat(path).st_mode)
        except OSError:
            return replace(self, path=path)
        return replace(self, path=path, mode=mode)


@dataclass(frozen=True, slots=True, repr=False)
class _Descriptor(SocketPlace[IAddress, IAddress]):
    fd: int
    own: bool

    takes_backlog: ClassVar[bool] = False

    def open(self, backlog: int, given: socket.socket | None = None) -> ListeningSocket:
        if given is not None:
            close_given(given)
            raise ValueError(
                f"socket={given!r} with of_fd({self.fd}): one of the two is enough"
            )
        return adopt(self.fd, own=self.own)

    def again(self, address: IAddress) -> _Descriptor:
        raise ValueError("who has opened that descriptor may hold it too")

    def __str__(self) -> str:
        return f"fd:{self.fd}"


@dataclass(frozen=True, slots=True, repr=False)
class EndpointPlace(WhereToListen[IAddress, IAddress]):
    """A place that only an endpoint can listen on."""

    endpoint: str | IStreamServerEndpoint

    def resolve(self, reactor: Any) -> IStreamServerEndpoint:
        """
        The endpoint itself.

        :raises ValueError: the description cannot be parsed, or its plugin
            refuses it (whatever it raised is the cause).
        """
        if not isinstance(self.endpoint, str):
            return self.endpoint
        try:
            return cast(IStreamServerEndpoint, serverFromString(reactor, self.endpoint))
        except Exception as error:
            raise ValueError(
                f"endpoint={self.endpoint!r} cannot be used: "
                f"{type(error).__name__}: {error}{_remedy(self.endpoint, error)}"
            ) from error

    def again(self, address: IAddress) -> EndpointPlace:
        """:raises ValueError: always; it says why."""
        raise ValueError("an endpoint does not promise the same address again")

    def __str__(self) -> str:
        if isinstance(self.endpoint, str):
            return one_line(self.endpoint)
        return repr(self.endpoint)


def _remedy(description: str, error: Exception) -> str:
    """What helps against an error that does not say so."""
    if isinstance(error, ModuleNotFoundError) and error.name == "OpenSSL":
        return "; for TLS install tcpsvc[tls]"
    if isinstance(error, KeyError) and description.startswith("systemd:"):
        return "; systemd has passed no socket of this name (FileDescriptorName=)"
    return ""
