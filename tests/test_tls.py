"""Streams under TLS (spec S10, and what S4 to S8, H1, H3 and X3 come to there)."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.defer import Deferred
from twisted.internet.ssl import DefaultOpenSSLContextFactory

from tcpsvc import BufferAgeLimitExceeded, ConnectionGone, WhereToListen
from tests.streams import Held, ended, outcome
from tests.support import Client, in_thread, turn, until
from tests.tls import client_context, make_certificate, tls_endpoint

MUCH = b"x" * 20_000_000


class TLSClient(Client):
    """A client that can do a handshake. EOF without close_notify is an error."""

    def handshake(self) -> None:
        """Begin to speak TLS."""
        self.socket = client_context().wrap_socket(
            self.socket, suppress_ragged_eofs=False
        )


@pytest.fixture
def connect() -> Iterator[Callable[..., TLSClient]]:
    """``connect(server)``: a client, closed after the test."""
    made: list[TLSClient] = []

    def connect(server: Any) -> TLSClient:
        client = TLSClient(server)
        made.append(client)
        return client

    yield connect
    for client in made:
        client.close()


@pytest.fixture
def where(tmp_path: Any) -> WhereToListen[Any, Any]:
    """A free port of the loopback address, with a certificate."""
    return WhereToListen.of_endpoint(tls_endpoint(tmp_path))


class Scene(Held):
    """A connection whose streams the test holds."""

    async def full(self) -> None:
        """Wait until the kernel takes no more of what was written."""
        still, before = 0, -1
        while still < 20:
            await turn(0.001)
            now = self.writer.bytes_to_write
            still, before = (still + 1 if now == before else 0), now

    @property
    def is_over(self) -> bool:
        """Whether the slot is free."""
        return bool(self.server.num_connections == 0)


@pytest.fixture
def scene(serve: Any, connect: Any, where: Any) -> Callable[..., Awaitable[Scene]]:
    """``await scene(handshake=True, **options)``."""

    async def scene(handshake: bool = True, **options: Any) -> Scene:
        made = Scene()
        await made.begin(serve, connect, where=where, **options)
        if handshake:
            await in_thread(made.client.handshake)
        await made.started()
        if handshake:
            # The client's last word of it may still be on its way.
            tls = made.writer.transport.getHandle()
            await until(tls.get_peer_finished)
        return made

    return scene


# The handshake


@ensureDeferred
async def test_a_handler_may_start_before_the_handshake_and_holds_its_slot(
    scene: Any,
) -> None:
    """S10, A5: a client that never says anything holds one."""
    s = await scene(handshake=False)
    assert s.server.num_connections == 1
    s.writer.write(b"early")
    flushing = outcome(s.writer.flushed())
    for _ in range(10):
        await turn()
    assert (flushing, s.writer.bytes_to_write) == ([], 5)
    await in_thread(s.client.handshake)
    assert await in_thread(s.client.read, 5) == b"early"
    assert await ended(flushing) is None


@ensureDeferred
async def test_a_handler_that_ends_before_the_handshake_has_its_bytes_sent(
    scene: Any,
) -> None:
    """S10, H3: flushed, then closed, with close_notify."""
    s = await scene(handshake=False)
    s.writer.write(MUCH)
    s.end.callback(None)
    for _ in range(10):
        await turn()
    assert s.server.num_connections == 1
    await in_thread(s.client.handshake)
    assert await in_thread(s.client.read_all) == MUCH
    s.client.close()
    await until(lambda: s.is_over)


@ensureDeferred
async def test_a_handler_that_ends_at_once_without_a_word_ends_cleanly(
    serve: Any, connect: Any, where: Any
) -> None:
    """S10, H3: nothing is written; no error, no slot; the client's end comes."""
    server = await serve(lambda *_: None, where=where, on_handler_error="raise")
    client = connect(server)

    def talk() -> None:
        # Nothing was promised: the handshake may not even end.
        with contextlib.suppress(OSError):
            client.handshake()
            assert client.read_all() == b""

    await in_thread(talk)
    await until(lambda: server.num_connections == 0)
    assert not server.is_closed


@ensureDeferred
async def test_no_handshake_within_the_flush_timeout_is_aborted(scene: Any) -> None:
    """S10, H3: the handler has written and ended; the client says nothing."""
    s = await scene(handshake=False)
    s.writer.write(b"early")
    s.end.callback(None)
    assert 30 <= await s.seconds_until(lambda: s.is_over) <= 45
    with pytest.raises(ConnectionResetError):
        await in_thread(s.client.read_all)


@ensureDeferred
async def test_bytes_that_wait_for_a_handshake_grow_old(scene: Any) -> None:
    """S10, S6: buffer_age_limit."""
    s = await scene(handshake=False, buffer_age_limit=10)
    s.writer.write(b"early")
    flushing = outcome(s.writer.flushed())
    await s.seconds_until(lambda: s.writer.is_closed, 14)
    assert isinstance(flushing[0], BufferAgeLimitExceeded)
    assert s.errors == flushing


@pytest.mark.parametrize(
    "sent", [b"GET / HTTP/1.0\r\n\r\n", b"\x00" * 1000, b"\x16\x03"]
)
@ensureDeferred
async def test_what_is_no_handshake_ends_the_streams(scene: Any, sent: bytes) -> None:
    """S10: EOF for the reader, ConnectionGone for the writer; nothing is logged."""
    s = await scene(handshake=False)
    s.writer.write(b"never sent")
    flushing, reading = outcome(s.writer.flushed()), outcome(s.reader.read())
    s.client.send(sent)
    s.client.shut()
    assert isinstance(await ended(flushing), ConnectionGone)
    assert await ended(reading) == b""
    s.end.callback(None)
    await until(lambda: s.is_over)
    assert s.errors == []


# Reading and writing


@ensureDeferred
async def test_what_is_echoed_comes_back_and_ends_cleanly(
    serve: Any, connect: Any, where: Any
) -> None:
    """S10: lines in and out; then the handler's end, with close_notify."""

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        for _ in range(1000):
            writer.write(await reader.readline())
            await writer.drain()

    server = await serve(handler, where=where, on_handler_error="raise")
    client = connect(server)
    lines = b"".join(b"line %d\n" % n for n in range(1000))

    def talk() -> bytes:
        client.handshake()
        client.send(lines)
        got: bytes = client.read_all()
        return got

    assert await in_thread(talk) == lines
    client.close()
    await until(lambda: server.num_connections == 0)


@ensureDeferred
async def test_a_large_answer_is_flushed_before_the_close(scene: Any) -> None:
    """H3: all of it, then close_notify, though input is unread."""
    s = await scene()
    await in_thread(s.client.send, b"never read" * 1000)
    s.writer.write(MUCH)
    s.end.callback(None)
    assert await in_thread(s.client.read_all) == MUCH
    s.client.close()
    await until(lambda: s.is_over)
    assert s.errors == []


@ensureDeferred
async def test_flushed_fires_only_when_the_kernel_has_taken_all(scene: Any) -> None:
    """S5: what TLS holds is not taken."""
    s = await scene()
    s.writer.write(MUCH)
    flushing = outcome(s.writer.flushed())
    await in_thread(s.client.read, 1_000_000)
    await s.full()
    assert flushing == []
    assert 0 < s.writer.bytes_to_write < len(MUCH)
    await in_thread(s.client.read, len(MUCH) - 1_000_000)
    assert await ended(flushing) is None
    assert s.writer.bytes_to_write == 0


@ensureDeferred
async def test_a_small_write_is_flushed_too(scene: Any) -> None:
    """S5: and again, and from the callback of the one before."""
    s = await scene()
    for _ in range(3):
        s.writer.write(b"a")
        s.writer.write(b"b")
        await s.writer.flushed()
        s.writer.write(b"c")
        await s.writer.flushed()
    assert s.writer.bytes_to_write == 0
    assert await in_thread(s.client.read, 9) == b"abcabcabc"


@ensureDeferred
async def test_a_client_that_blasts_is_held_back(scene: Any) -> None:
    """S3: the buffer's size and about one receive, under TLS too."""
    s = await scene(reader_buffer_size=10_000)
    sending = in_thread(s.client.send, MUCH)
    await until(lambda: s.reader.bytes_read >= 10_000)
    for _ in range(30):
        await turn(0.001)
    assert s.reader.bytes_read <= 10_000 + 2 * 65536
    got = 0
    while got < len(MUCH):
        got += len(await s.reader.read(100_000))
    await sending
    assert got == len(MUCH)
    # Not to end, and be closed, from inside of what delivers.
    await turn()


# Ends


@ensureDeferred
async def test_there_is_no_half_close(scene: Any) -> None:
    """S10: can_write_eof is False, write_eof() raises, and harms nothing."""
    s = await scene()
    assert s.writer.can_write_eof is False
    with pytest.raises(RuntimeError):
        s.writer.write_eof()
    s.writer.write(b"still open")
    assert await in_thread(s.client.read, 10) == b"still open"


def send_close_notify(client: TLSClient) -> None:
    """That alone; what the server has sent, or may answer, is not read."""
    client.socket.setblocking(False)
    with contextlib.suppress(OSError):
        client.socket.unwrap()


@pytest.mark.parametrize("way", ["unwrap", "close", "reset"])
@ensureDeferred
async def test_the_clients_close_ends_both_directions(scene: Any, way: str) -> None:
    """S10: what it sent, then EOF; ConnectionGone for the writer."""
    s = await scene()
    await in_thread(s.client.send, b"last words")
    await until(lambda: s.reader.bytes_read == 10)
    s.writer.write(MUCH)
    flushing = outcome(s.writer.flushed())
    await s.full()

    def leave() -> None:
        if way == "unwrap":
            send_close_notify(s.client)
            raw = socket.socket(fileno=s.client.socket.detach())
            raw.settimeout(10)
            while raw.recv(1_000_000):
                pass
            raw.close()
        elif way == "reset":
            s.client.reset()
        else:
            s.client.close()

    await in_thread(leave)
    assert isinstance(await ended(flushing), ConnectionGone)
    assert await s.reader.read() == b"last words"
    assert s.reader.at_eof()
    s.writer.write(b"dropped")
    assert isinstance(outcome(s.writer.drain())[0], ConnectionGone)
    s.end.callback(None)
    await until(lambda: s.is_over)


@ensureDeferred
async def test_a_close_notify_ends_both_directions_though_its_sender_does_not_read(
    scene: Any,
) -> None:
    """S10: the handler need not wait for the age limit to hear of it."""
    s = await scene(buffer_age_limit=None)
    s.narrow()
    s.writer.write(MUCH)
    flushing, reading = outcome(s.writer.flushed()), outcome(s.reader.read())
    await s.full()
    send_close_notify(s.client)
    await s.seconds_until(lambda: flushing and reading, 40)
    assert isinstance(flushing[0], ConnectionGone)
    assert reading == [b""]


@ensureDeferred
async def test_close_notify_is_no_reset(scene: Any) -> None:
    """S4, S10: consumer_left does not fire at an orderly end."""
    s = await scene()
    left = s.writer.consumer_left()
    await in_thread(lambda: s.client.socket.unwrap().close())
    await ended(outcome(s.writer.close_finished()))
    assert not left.called
    assert await s.reader.read() == b""


@ensureDeferred
async def test_a_reset_is_one(scene: Any) -> None:
    """S4: consumer_left."""
    s = await scene()
    left = outcome(s.writer.consumer_left())
    s.client.reset()
    assert await ended(left) is None


@ensureDeferred
async def test_own_close_flushes_and_keeps_the_slot(scene: Any) -> None:
    """S8: writer.close()."""
    s = await scene()
    s.writer.write(MUCH)
    flushing = outcome(s.writer.flushed())
    reading = outcome(s.reader.read())
    s.writer.close()
    with pytest.raises(RuntimeError):
        s.writer.write(b"more")
    assert reading == [b""]
    assert await in_thread(s.client.read_all) == MUCH
    assert await ended(flushing) is None
    s.client.close()
    await ended(outcome(s.writer.close_finished()))
    assert s.server.num_connections == 1
    s.end.callback(None)
    assert s.is_over


@ensureDeferred
async def test_abort_is_a_reset(scene: Any) -> None:
    """S5: without close_notify."""
    s = await scene()
    s.writer.write(MUCH)
    s.writer.abort()
    with pytest.raises((ConnectionResetError, ssl.SSLError)):
        await in_thread(s.client.read_all)
    s.end.callback(None)
    await until(lambda: s.is_over)


@pytest.mark.parametrize("way", ["x3", "reader.close"])
@ensureDeferred
async def test_closed_at_once_the_streams_end(scene: Any, way: str) -> None:
    """X3, S8: though the client neither reads nor answers close_notify."""
    s = await scene()
    await in_thread(s.client.send, b"buffered")
    await until(lambda: s.reader.bytes_read == 8)
    s.writer.write(MUCH)
    flushing = outcome(s.writer.flushed())
    await s.full()
    if way == "x3":
        await s.server.close(close_existing_connections=True)
        assert await s.reader.read() == b"buffered"
    else:
        s.reader.close()
    assert outcome(s.writer.close_finished()) == [None]
    assert isinstance(flushing[0], ConnectionGone)
    s.end.callback(None)
    assert s.is_over
    assert s.clock.getDelayedCalls() == []


@pytest.mark.parametrize("way", ["reader.close", "x3", "abort", "close", "end"])
@ensureDeferred
async def test_any_end_from_within_a_read(
    serve: Any, connect: Any, where: Any, logs: Any, way: str
) -> None:
    """S8, X5: TLS is about to look for more input, and must not stumble."""
    results: list[Any] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        results.append(await reader.readline())
        if way == "reader.close":
            reader.close()
        elif way == "x3":
            server.close(close_existing_connections=True)
        elif way == "abort":
            writer.abort()
        elif way == "close":
            writer.close()

    server = await serve(handler, where=where, on_handler_error="raise")
    client = connect(server)
    await in_thread(client.handshake)

    def talk() -> None:
        # In one record more than one line; the next follows it closely, and may
        # meet the end already.
        with contextlib.suppress(OSError):
            client.send(b"line\nline\n" + b"x" * 40_000)

    await in_thread(talk)
    await until(lambda: results)
    await turn()
    client.close()
    await until(lambda: server.num_connections == 0)
    assert logs.bad() == []


# Peers that do not behave


@ensureDeferred
async def test_a_peer_that_ignores_close_notify_is_aborted(scene: Any) -> None:
    """H3: after flush_timeout; it reads nothing, answers nothing, stays."""
    s = await scene()
    s.writer.write(b"bye")
    s.end.callback(None)
    assert 30 <= await s.seconds_until(lambda: s.is_over) <= 45
    assert s.clock.getDelayedCalls() == []
    raw = socket.socket(fileno=s.client.socket.detach())
    raw.settimeout(5)
    with pytest.raises(ConnectionResetError):
        await in_thread(lambda: [raw.recv(65536) for _ in range(10)])
    raw.close()


@ensureDeferred
async def test_after_its_own_close_such_a_peer_has_five_seconds(scene: Any) -> None:
    """H3: and the slot waits for the handler."""
    s = await scene()
    closed = s.writer.close_finished()
    s.writer.close()
    assert 5 <= await s.seconds_until(lambda: closed.called) <= 20
    assert s.server.num_connections == 1
    s.end.callback(None)
    assert s.is_over


@ensureDeferred
async def test_a_peer_that_does_not_read_is_aborted(scene: Any) -> None:
    """H3: during the flush, after flush_timeout."""
    s = await scene()
    s.narrow()
    s.writer.write(MUCH)
    await s.full()
    s.end.callback(None)
    assert 30 <= await s.seconds_until(lambda: s.is_over) <= 45


@ensureDeferred
async def test_a_peer_that_does_not_read_meets_the_age_limit(scene: Any) -> None:
    """S6: closed at once, without waiting for its close_notify."""
    s = await scene(buffer_age_limit=10)
    s.narrow()
    s.writer.write(MUCH)
    flushing = outcome(s.writer.flushed())
    await s.full()
    assert 10 <= await s.seconds_until(lambda: s.writer.is_closed) <= 13
    assert isinstance(flushing[0], BufferAgeLimitExceeded)
    assert s.errors == flushing
    assert outcome(s.writer.close_finished()) == [None]
    s.end.callback(None)
    assert s.is_over


@ensureDeferred
async def test_a_peer_that_answers_close_notify_late_is_waited_for(scene: Any) -> None:
    """H3: it is not aborted while there is time."""
    s = await scene()
    s.writer.write(b"bye")
    s.end.callback(None)
    for _ in range(25):
        s.clock.advance(1)
        await turn()
    assert s.server.num_connections == 1
    assert await in_thread(s.client.read_all) == b"bye"
    await in_thread(lambda: s.client.socket.unwrap().close())
    await until(lambda: s.is_over)
    assert s.server.describe()["counters"]["aborted"] == 0


@ensureDeferred
async def test_the_streams_show_the_tls_beneath(scene: Any) -> None:
    """S7: through the transport, from both streams."""
    s = await scene()
    assert s.writer.transport is s.reader.transport
    assert s.writer.peer.port == s.client.socket.getsockname()[1]
    assert s.writer.host.port == s.server.listening_on_address.port
    assert s.writer.transport.getPeerCertificate() is None
    assert s.writer.transport.negotiatedProtocol is None


@ensureDeferred
async def test_max_connections_is_exact_under_tls(
    serve: Any, connect: Any, where: Any
) -> None:
    """A1, A5: handshakes that have not ended count."""
    ends: list[Deferred[None]] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        ends.append(Deferred())
        await ends[-1]

    server = await serve(handler, where=where, max_connections=2)
    clients = [connect(server) for _ in range(5)]
    await until(lambda: len(ends) == 2)
    for _ in range(10):
        await turn()
    assert (len(ends), server.num_connections) == (2, 2)
    clients[0].reset()
    ends[0].callback(None)
    await until(lambda: len(ends) == 3)
    assert server.num_connections == 2


@pytest.mark.parametrize("engine", ["auto", "reactor"])
@ensureDeferred
async def test_a_last_word_under_tls_that_a_handler_started_is_sent(
    serve: Any, connect: Any, tmp_path: Path, engine: str
) -> None:
    """H3, S10: TLS holds small writes back for a turn; and it says goodbye, which is
    no half-close."""
    certificate = str(make_certificate(tmp_path))
    context = DefaultOpenSSLContextFactory(certificate, certificate)

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        assert await reader.readline() == b"STARTTLS\n"
        writer.write(b"go ahead\n")
        await writer.flushed()
        assert writer.can_write_eof
        reader.transport.startTLS(context)
        assert not writer.can_write_eof
        with pytest.raises(RuntimeError, match="no half-close"):
            writer.write_eof()
        writer.write((await reader.readline()).upper())

    server = await serve(handler, engine=engine, on_handler_error="raise")
    client = connect(server)

    def talk() -> tuple[bytes, bytes]:
        client.send(b"STARTTLS\n")
        assert client.read(9) == b"go ahead\n"
        with client_context().wrap_socket(
            client.socket, suppress_ragged_eofs=False
        ) as secure:
            secure.sendall(b"hello\n")
            return secure.recv(100), secure.recv(100)

    assert await in_thread(talk) == (b"HELLO\n", b"")
    await until(lambda: server.num_connections == 0)
    assert server.describe()["counters"]["ends"] == {"finished": 1}


@pytest.mark.parametrize("engine", ["auto", "reactor"])
@ensureDeferred
async def test_a_stream_handler_starts_tls_in_the_middle(
    serve: Any, connect: Any, tmp_path: Path, engine: str
) -> None:
    """S7: its transport can; what it wrote last arrives whole, under TLS."""
    certificate = str(make_certificate(tmp_path))
    context = DefaultOpenSSLContextFactory(certificate, certificate)
    much = b"x" * 300_000

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        assert await reader.readline() == b"STARTTLS\n"
        writer.write(b"go ahead\n")
        await writer.flushed()
        reader.transport.startTLS(context)
        while (line := await reader.readline()) != b"quit\n":
            writer.write(line.upper())
            await writer.drain()
        writer.write(much)

    server = await serve(handler, engine=engine, on_handler_error="raise")
    client = connect(server)

    def talk() -> bytes:
        client.send(b"STARTTLS\n")
        assert client.read(9) == b"go ahead\n"
        with client_context().wrap_socket(client.socket) as secure:
            secure.sendall(b"hello\n")
            assert secure.recv(100) == b"HELLO\n"
            secure.sendall(b"quit\n")
            received = b""
            while data := secure.recv(65536):
                received += data
            return received

    assert await in_thread(talk) == much
    await until(lambda: server.num_connections == 0)
    assert server.describe()["counters"]["ends"] == {"finished": 1}
