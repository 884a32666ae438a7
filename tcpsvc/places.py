"""
Several places at once: they are bound all or none, and where they leave the port
to the operating system, on the same one (spec L1, L2).
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from twisted.internet.error import CannotListenError

from tcpsvc.log import log
from tcpsvc.sockets import MAX_RETRIES_UPON_ADDR_IN_USE, ListeningSocket
from tcpsvc.where import (
    AddressT,
    EndpointPlace,
    ListeningOnT,
    SocketPlace,
    WhereToListen,
)

#: One place, or several that are one server.
Places = (
    WhereToListen[AddressT, ListeningOnT]
    | Sequence[WhereToListen[AddressT, ListeningOnT]]
)


def places_of(where: Places[Any, Any]) -> tuple[WhereToListen[Any, Any], ...]:
    """
    One place or several, as several.

    :raises ValueError: there is none.
    :raises TypeError: one is no WhereToListen.
    """
    if isinstance(where, WhereToListen):
        return (where,)
    if not isinstance(where, Sequence) or isinstance(where, (str, bytes)):
        raise TypeError(_no_place(where))
    if not where:
        raise ValueError(f"where={where!r} is empty: name a place to listen")
    for place in where:
        if not isinstance(place, (SocketPlace, EndpointPlace)):
            raise TypeError(_no_place(place))
    return tuple(where)


def _no_place(given: object) -> str:
    """What it is, and what to write for a port, or an endpoint's description."""
    said = f"where={given!r} is not a WhereToListen"
    if isinstance(given, int):
        return f"{said}; a port is WhereToListen.of_port({given})"
    if isinstance(given, str):
        return f"{said}; an endpoint's description is for WhereToListen.of_endpoint"
    return said


def places_text(places: Iterable[WhereToListen[Any, Any]]) -> str:
    """Several places in one line."""
    return ", ".join(map(str, places))


def open_all(
    places: Sequence[SocketPlace[Any, Any]], backlog: int, given: socket.socket | None
) -> list[ListeningSocket]:
    """
    Bind and listen on all places, or on none.

    :param given: the caller's own socket, for a single place (spec W7).
    :raises CannotListenError: the kernel has refused one of them.
    """
    opened: dict[int, ListeningSocket] = {}
    try:
        for group in _with_one_port(places):
            if len(group) == 1:
                made = [places[group[0]].open(backlog, given)]
            else:
                made = _open_with_one_port([places[n] for n in group], backlog)
            opened.update(zip(group, made, strict=True))
    except BaseException:
        discard_all(opened.values())
        raise
    return [opened[number] for number in range(len(places))]


def _with_one_port(places: Sequence[SocketPlace[Any, Any]]) -> Iterable[list[int]]:
    """
    Which of the places are to have one port, by their numbers: those that leave it to
    the operating system. An address that comes again cannot: it begins with a port of
    its own, which is what someone who asks for a free port twice wants.
    """
    groups: dict[object, list[int]] = {}
    times: Counter[object] = Counter()
    for number, place in enumerate(places):
        group: object = ("its own", number)
        if place.leaves_port_to_os:
            address: Any = place.address
            host = ipaddress.ip_address(address.host)
            group = ("free", times[host])
            times[host] += 1
        groups.setdefault(group, []).append(number)
    return groups.values()


def _open_with_one_port(
    places: Sequence[SocketPlace[Any, Any]], backlog: int
) -> list[ListeningSocket]:
    """
    The first takes a free port, the others the same. It may be taken there: then
    another free port is tried, as often as for a single place (spec W3).
    """
    retries = 0
    while True:
        opened: list[ListeningSocket] = []
        try:
            opened.append(places[0].open(backlog))
            chosen: Any = opened[0].address
            for place in places[1:]:
                where = place.with_port(chosen.port)
                opened.append(where.open(backlog))
        except CannotListenError as error:
            discard_all(opened)
            why: OSError = error.socketError
            if not opened or why.errno != errno.EADDRINUSE:
                raise
            if retries == MAX_RETRIES_UPON_ADDR_IN_USE:
                raise CannotListenError(
                    error.interface,
                    error.port,
                    OSError(
                        why.errno,
                        f"{why.strerror} (after {retries} retries: no port was free "
                        f"on {places_text(places)} alike)",
                    ),
                ) from error
            retries += 1
        except BaseException:
            discard_all(opened)
            raise
        else:
            return opened


def discard_all(opened: Iterable[ListeningSocket]) -> None:
    """Close them all unserved, whatever befalls one of them."""
    for listening in opened:
        try:
            listening.discard()
        except OSError as error:
            log.error(
                "could not unlink {address}: {error}",
                address=str(listening.path),
                error=error,
            )
