"""What lines of the log say of clients, and how often of errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.defer import Deferred
from twisted.logger import LogLevel, formatEvent

import tcpsvc
from tcpsvc.log_fields import of_client
from tcpsvc.testing import MemoryServer

# Clients


async def raises(address: Any, reader: Any, writer: Any) -> None:
    """A handler that fails."""
    raise LookupError("oh dear")


async def leaves(address: Any, reader: Any, writer: Any) -> None:
    """A handler that ends because its client has."""
    await writer.close_finished()
    await writer.flushed()


async def waits(address: Any, reader: Any, writer: Any) -> None:
    """A handler that is never done by itself."""
    await Deferred()


def exits(address: Any, reader: Any, writer: Any) -> None:
    """A handler that ends the process."""
    raise SystemExit(1)


def cannot_be_cancelled(address: Any, reader: Any, writer: Any) -> Deferred[None]:
    """A handler whose canceller fails."""

    def cancel(_: Any) -> None:
        raise LookupError("not me")

    return Deferred(cancel)


def cancel_all(server: MemoryServer) -> None:
    """As a close may do."""
    server.factory.cancel_handlers()


def pass_time(server: MemoryServer) -> None:
    """Until a timeout is over."""
    server.clock.advance(10)


def reset(server: MemoryServer) -> None:
    """The client goes away."""
    server.factory.connections[0].close()


#: What a line says: the handler, its options, and what else is to be done.
LINES: dict[str, tuple[Any, dict[str, Any], Callable[[MemoryServer], None] | None]] = {
    "handler of {client} failed": (
        raises,
        {"on_handler_error": tcpsvc.log_error},
        None,
    ),
    "handler of {client} failed, ignored": (
        raises,
        {"on_handler_error": "ignore"},
        None,
    ),
    "handler of {client} left with": (leaves, {}, reset),
    "ending {client}: lifetime": (waits, {"lifetime": 5.0}, pass_time),
    "dry run: {client} would have been": (
        waits,
        {"lifetime": 5.0, "dry_run": ["lifetime"]},
        pass_time,
    ),
    "handler of {client} raised SystemExit": (exits, {}, None),
    "cancelling the handler of {client} failed": (cannot_be_cancelled, {}, cancel_all),
}


@pytest.mark.parametrize("line", LINES)
def test_a_client_is_named_as_people_write_it(line: str, logs: Any) -> None:
    """And its address is a field of the event."""
    handler, options, then = LINES[line]
    server = MemoryServer(handler, **options)
    client = server.connect()
    if then is not None:
        client.send(b"x")
        then(server)
    name = f"{client.address.host}:{client.address.port}"
    (event,) = [
        e for e in logs.events if line.format(client=name) in (formatEvent(e) or "")
    ]
    assert event["peer"] == client.address
    logs.take(LogLevel.critical)
    assert logs.unreadable() == []


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (IPv4Address("TCP", "192.0.2.1", 80), "192.0.2.1:80"),
        (IPv6Address("TCP", "2001:db8::1", 80), "[2001:db8::1]:80"),
        (UNIXAddress(b"/run/a\nb"), r"unix:/run/a\nb"),
        (None, "None"),
    ],
)
def test_the_text_of_an_address_is_made_where_it_is_written(
    address: Any, text: str
) -> None:
    """A line that nobody reads costs no text."""
    fields = of_client(address)
    assert fields["peer"] is address
    assert not isinstance(fields["client"], str)
    event = {"log_format": "{client} came", **fields}
    assert formatEvent(event) == f"{text} came"
