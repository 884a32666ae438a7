"""
What a server does when the kernel gives it no client, for want of descriptors or of
memory (spec A6): it rests and tries again, and meanwhile, if it is to, turns away who
waits.

An *episode* lasts from the first accept that fails until one succeeds and nobody is
left waiting. ::

    accepting ──failed()──▶ resting ──50 ms, or a descriptor of the server closed──┐
        ▲                   (shedding at its beginning)                            │
        └──────────────────────────────────────────────────────────────────────────┘
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any, Protocol

from twisted.internet.interfaces import IDelayedCall
from twisted.python.failure import Failure

from tcpsvc.entrance import Entrance
from tcpsvc.error_log import ErrorLog
from tcpsvc.handler import STOPPING, run_handler
from tcpsvc.log import log
from tcpsvc.rate import Rate, TokenBucket
from tcpsvc.settings import Settings
from tcpsvc.slots import Slots

#: The process or the host has run out of something that will come back.
EXHAUSTION_ERRNOS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

#: This one client is lost; the next may be well (EPERM: a packet filter).
NEXT_CLIENT_ERRNOS = frozenset(
    {errno.ECONNABORTED, errno.EINTR, errno.EPROTO, errno.EPERM}
)

#: How long accepting rests when descriptors have run out, in seconds. A
#: connection of this server that closes ends the rest at once.
EXHAUSTION_PAUSE = 0.05

#: How many clients of a port are turned away in one turn of the reactor: 2 ms of it,
#: and more than wait in the default backlog.
SHED_BATCH = 128

#: How long it rests after a batch when more wait, in seconds: long beside what a batch
#: takes, so that clients that come again at once do not keep the process busy.
SHED_PAUSE = 0.01

#: An episode has one log line. Where descriptors come and go all the time there may be
#: many a second: then not each has one.
LINES = Rate(1 / 60, 5)


class Port(Protocol):
    """A listening port, as it is seen from here: a gate."""

    @property
    def is_awaited(self) -> bool:
        """Whether a client waits to be accepted."""

    def turn_away(self) -> None:
        """
        Accept a client and close it.

        :raises OSError: as ``accept`` does.
        """


class Owner(Protocol):
    """Whose ports they are: the factory."""

    settings: Settings
    clock: Any
    errors: ErrorLog
    events: Any
    server: Any
    slots: Slots
    entrance: Entrance

    def stop_reactor(self, error: BaseException) -> None: ...


class Episode:
    """
    What has been said of an episode.

    :ivar hook_has_failed: whether ``on_accept_error`` has.
    """

    hook_has_failed = False


class Exhaustion:
    """
    The failures to accept of one server, on however many ports.

    :param owner: the factory; its clock times the rests.
    :param on_change: called when ``pause`` begins or ends.
    :ivar pause: while it is not ``None`` no port of the server is to accept.
    :ivar episode: the one that lasts, if one does.
    """

    def __init__(self, owner: Owner, on_change: Callable[[], object]) -> None:
        self._owner = owner
        self._on_change = on_change
        self._ports: list[Port] = []
        self._reserve = Reserve()
        self._lines = TokenBucket(LINES)
        self._is_hook_running = False
        self.pause: IDelayedCall | None = None
        self.episode: Episode | None = None

    # Ports come and go.

    def enter(self, port: Port) -> None:
        """A port begins to accept."""
        self._ports.append(port)
        self.update_reserve()

    def leave(self, port: Port) -> None:
        """It ends. After the last there is neither a timer nor a descriptor."""
        if port in self._ports:
            self._ports.remove(port)
        if not self._ports:
            self._end_pause()
            self.episode = None
            self._reserve.give_up()

    def update_reserve(self) -> None:
        """
        Have a descriptor in reserve exactly if it may be needed. If none can be had,
        there is none until it is tried again: at the end of each rest, and when a
        descriptor of the server closes, before waiting clients get that. Otherwise
        they would keep the server from ever telling the others.
        """
        if self._ports and self._owner.settings.on_exhaustion == "shed":
            self._reserve.take()
        else:
            self._reserve.give_up()

    def broken(self) -> list[str]:
        """What does not hold, and ought to."""
        checks = {
            "accepting rests only in an episode": self.pause is None
            or self.episode is not None,
            "it rests for a time": self.pause is None or bool(self.pause.active()),
            "without ports there is neither a rest nor a reserve": bool(self._ports)
            or (self.pause is None and not self._reserve.is_held),
        }
        return [check for check, holds in checks.items() if not holds]

    # What happens to them.

    def failed(self, error: OSError) -> None:
        """A port could not accept: rest."""
        if self.episode is None:
            self.episode = Episode()
            if self._lines.take(self._owner.clock.seconds()):
                self._say(error)
        self._rest(EXHAUSTION_PAUSE, self._try_again)
        self._owner.events.accept_failed(error)
        if self.pause is not None:  # An observer may have closed the server.
            self._ask(error)
        # Nobody is turned away when a descriptor is free by now.
        if self.pause is None or not self._reserve.is_held:
            return
        if error.errno not in EXHAUSTION_ERRNOS:
            return
        if self._owner.settings.on_accept_error is not None:
            # Some of what it has closed is closed in the next turn.
            self._rest(0, self._shed)
        else:
            self._shed()

    def accepted(self) -> None:
        """A port could; to be told during an episode."""
        if not self.is_awaited:
            self.episode = None

    @property
    def is_awaited(self) -> bool:
        """Whether a client waits at any of the ports."""
        return any(p.is_awaited for p in self._ports)

    def descriptor_closed(self) -> None:
        """A descriptor of this server is free again: try at once."""
        if self.pause is not None:
            self._end_pause()
            self._try_again()
        elif self._owner.settings.on_exhaustion == "shed":
            self.update_reserve()

    def _rest(self, seconds: float, then: Callable[[], None]) -> None:
        was_resting = self.pause is not None
        self._end_pause()
        self.pause = self._owner.clock.callLater(seconds, then)
        if not was_resting:
            self._on_change()

    def _end_pause(self) -> None:
        if self.pause is not None:
            if self.pause.active():
                self.pause.cancel()
            self.pause = None

    def _try_again(self) -> None:
        self.pause = None
        self.update_reserve()
        self._on_change()

    def _say(self, error: OSError) -> None:
        if error.errno not in EXHAUSTION_ERRNOS:
            log.failure(
                "accepting failed; trying again every {pause} s",
                failure=Failure(error),
                pause=EXHAUSTION_PAUSE,
            )
            return
        log.error(
            "cannot accept: {error}. {live} connections go on, further clients "
            "{fate}; trying again every {pause} s. Raise the limit of open files "
            "(ulimit -n), or lower max_connections ({limit})",
            error=error.strerror,
            live=self._owner.slots.taken,
            fate="are turned away" if self._reserve.is_held else "wait",
            pause=EXHAUSTION_PAUSE,
            limit=self._owner.slots.limit,
        )

    # The hook.

    def _ask(self, error: OSError) -> None:
        hook = self._owner.settings.on_accept_error
        # One that waits for something is not called again meanwhile.
        if hook is None or self._is_hook_running:
            return
        self._is_hook_running = True
        done = run_handler(hook, error, self._owner.server)
        done.addErrback(self._hook_failed, self.episode or Episode())
        done.addBoth(self._hook_ended)

    def _hook_failed(self, failure: Failure, episode: Episode) -> None:
        if failure.check(*STOPPING):
            assert failure.value is not None
            self._owner.stop_reactor(failure.value)
        if not episode.hook_has_failed:
            episode.hook_has_failed = True
            self._owner.errors.failure("on_accept_error failed", failure)

    def _hook_ended(self, _: object) -> None:
        self._is_hook_running = False

    # Shedding.

    def _shed(self) -> None:
        """Turn away who waits, by means of the descriptor that is in reserve."""
        pause = EXHAUSTION_PAUSE
        self._reserve.give_up()
        for port in list(self._ports):
            if not self._turn_away(port):
                pause = SHED_PAUSE
        self.update_reserve()
        # Whoever was told of it may have closed connections, or the server.
        if self.pause is not None:
            self._rest(pause, self._try_again)

    def _turn_away(self, port: Port) -> bool:
        """Returns whether nobody is left that could be."""
        for _ in range(SHED_BATCH):
            if (
                self.pause is None
                or port not in self._ports
                or self._owner.entrance.is_paused
            ):
                return True
            try:
                port.turn_away()
            except OSError as error:
                # EAGAIN: nobody waits. Or even this descriptor was not enough: the
                # host is short of them, or somebody else has taken it.
                if error.errno not in NEXT_CLIENT_ERRNOS:
                    return True
        return False


class Reserve:
    """A descriptor that is of no use but to be given up when there is no other."""

    def __init__(self) -> None:
        self._descriptor: int | None = None

    @property
    def is_held(self) -> bool:
        """Whether it is there."""
        return self._descriptor is not None

    def take(self) -> None:
        """Have it, if it can be had. Child processes do not (O_CLOEXEC)."""
        if self._descriptor is None:
            try:
                self._descriptor = os.open(os.devnull, os.O_RDONLY)
            except OSError:
                pass

    def give_up(self) -> None:
        """Close it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
