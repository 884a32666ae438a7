"""
The accept rule: whether the next client may be accepted, whether it is sent away then,
and whether it has to wait.

:meth:`Entrance.has_place` is what gates ask before each accept, and
:meth:`Entrance.refusal_of` what they ask about each client that they have accepted. On
a port that cannot be gated nobody asks before. So :meth:`Entrance.has_to_wait` says who
waits, accepted and unread, and :meth:`Entrance.place_found` who waits no more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from tcpsvc.admission import Admission, host_of
from tcpsvc.eviction import Eviction
from tcpsvc.held import Held
from tcpsvc.overflow import Refusal
from tcpsvc.rate_wait import RateWait
from tcpsvc.reasons import Reason
from tcpsvc.refusal_log import RefusalLog
from tcpsvc.settings import Settings
from tcpsvc.slots import Slots
from tcpsvc.starts import Starts


class Owner(Protocol):
    """Whose entrance it is: the factory."""

    settings: Settings
    clock: Any

    @property
    def is_awaited(self) -> bool:
        """Whether a client waits to be accepted, as far as that is known."""

    def admit_held(self, connection: Any) -> None:
        """It has a slot now, and may start."""


class Entrance:
    """
    Who gets in.

    :param owner: the factory.
    :param slots: how many are there.
    :param starts: which of them have not started yet.
    :param refusal_log: is told who does not get in, or has to wait.
    :ivar is_closed: whether nobody does any more.
    :ivar is_paused: whether a server's pause lets nobody in for now (spec Z1).
    :ivar is_dropping: whether each incoming connection is closed at once (spec D1).
    :ivar is_judged: whether a gate has asked about the next client.
    :ivar on_place: called when the outcome of :meth:`has_place` may have changed.
    """

    def __init__(
        self, owner: Owner, slots: Slots, starts: Starts, refusal_log: RefusalLog
    ) -> None:
        self._owner = owner
        self._clock = owner.clock
        self._slots = slots
        self._starts = starts
        self._refusal_log = refusal_log
        self.is_closed = False
        self.is_paused = False
        self.is_dropping = owner.settings.drop_incoming_connections
        self.admission = Admission(owner.settings)
        self.eviction = Eviction(slots, refusal_log)
        self.rate_wait = RateWait(
            self._clock, refusal_log.all_tokens_taken, self._rate_allows
        )
        self.held = Held()
        self.is_judged = False
        self.on_place: Callable[[], None] = _nothing

    # The rule.

    def has_place(self) -> bool:
        """Whether the next client may be accepted. The rule of the gate."""
        if self.is_closed or self.is_paused:
            return False
        if self.is_dropping:
            return True
        if self.rate_wait.timer is not None:
            return False
        return not self._slots.is_full or self._accepts_beyond()

    def _accepts_beyond(self) -> bool:
        """Whether clients are accepted although no slot is free."""
        settings = self._owner.settings
        if "max_connections" in settings.dry_run:
            return True
        if settings.overflow == "evict":
            under_way = self.eviction.under_way
            # Nobody is evicted before its start, if that can be helped.
            started = self._slots.taken - len(self._starts)
            return started > under_way or under_way > self.held.for_slots
        return settings.overflow != "hold"

    def refusal_of(
        self, host: str | None, address: Any, address_of: Callable[[Any], Any]
    ) -> tuple[Reason, Refusal] | None:
        """
        Whether an accepted client is to be sent away, why and how.

        :param host: its IP address; ``None`` for a UNIX client.
        :param address: its address, or what makes it:
        :param address_of: called with that when somebody is to be told of it.
        """
        self.is_judged = True
        if self.is_dropping:
            return Reason.DROPPED, "drop"
        if self.admission.asks:
            reason = self.admission.refusal(host, self._clock.seconds())
            if self.admission.tried_out:
                self._tell_what_was_tried_out(address_of(address))
            if reason is not None:
                return reason, self._owner.settings.refusal
        if not self._slots.is_full:
            return None
        settings = self._owner.settings
        overflow = settings.overflow
        if "max_connections" in settings.dry_run:
            self._refusal_log.in_dry_run(address_of(address), Reason.OVERFLOW)
        elif overflow == "evict":
            # One that has to wait for its time, or for a resume, evicts nobody yet.
            if not (self.rate_wait.timer or self.held.too_early or self.is_paused):
                self._make_room(1)
        elif overflow != "hold":
            return Reason.OVERFLOW, overflow
        return None

    def refused(self, address: Any, reason: Reason) -> None:
        """A client was sent away."""
        self.is_judged = False
        self._refusal_log.refused(address, reason)

    def has_to_wait(self, connection: Any) -> bool:
        """
        A client is to be served; it counts for its peer from now on.

        :returns: whether it is to wait, for a slot or for its time.
        """
        self.is_judged = False
        held = self.held
        is_early = self.rate_wait.timer is not None or bool(held.too_early)
        if is_early:
            held.too_early.add(connection.id)
        elif self.admission.has_rate:
            self._take_token(connection)
        if self.admission.counts_peers:
            now = self._clock.seconds()
            self.admission.enter(connection, host_of(connection.peer), now)
        return (
            is_early
            or bool(held.waiting)
            or (self._slots.is_full and self.is_full)
            or self.is_paused
        )

    @property
    def is_full(self) -> bool:
        """Whether whoever is accepted has to wait for a slot."""
        dry_run = self._owner.settings.dry_run
        return self._slots.is_full and "max_connections" not in dry_run

    @property
    def _evicts(self) -> bool:
        return self._owner.settings.overflow == "evict"

    def _make_room(self, newcomers: int) -> None:
        """Evict as many as newcomers, and those who wait, need to get slots."""
        wanted = self.held.for_slots + newcomers
        self.eviction.make_room(wanted, self._clock.seconds())

    # What changes it.

    def close(self) -> None:
        """Let nobody in from now on, nor any of those who wait."""
        self.is_closed = True
        self.rate_wait.stop()
        self._refuse_held(Reason.UNSERVED)

    def set_dropping(self, drop: bool) -> None:
        """Close each incoming connection at once, or stop doing so (spec D)."""
        self.is_dropping = drop
        if drop:
            self._refuse_held(Reason.DROPPED)
        self.on_place()

    def set_paused(self, paused: bool, last_id: int) -> None:
        """
        Let nobody in for now, not even to drop them, or go on. A port that cannot
        be gated accepts nevertheless: whom it accepts is held. Who was accepted
        before gets the next slot.

        :param last_id: the latest that was accepted.
        """
        if paused and not self.is_paused:
            # One that is being judged was accepted too: it may be for its sake that a
            # handler was evicted that pauses.
            self.held.last_before_pause = last_id + self.is_judged
        self.is_paused = paused
        if not paused and self._evicts and self.held.waiting:
            self._make_room(0)
        self.place_found()

    def limits_changed(self) -> None:
        """There are other limits, of addresses and of rates, for the next client."""
        present = [*self._slots.live.values(), *self.held.all]
        self.admission.change(self._owner.settings, present, self._clock.seconds())

    def rate_changed(self) -> None:
        """There is another ``accept_rate``, or another wait for it."""
        self._wait_for_rate(self.admission.wait(self._clock.seconds()))

    # The rate.

    def _take_token(self, connection: Any) -> None:
        wait = self.admission.take_token(self._clock.seconds())
        if self.admission.tried_out:
            self._tell_what_was_tried_out(connection.peer)
        if wait > 0:
            self._wait_for_rate(wait)

    def _wait_for_rate(self, seconds: float) -> None:
        self.rate_wait.begin(0.0 if self.is_closed else seconds)

    def _rate_allows(self) -> None:
        # Whoever waits now could have come in but for the rate.
        if (
            not self.is_dropping
            and self.has_place()
            and (self.held.too_early or self._owner.is_awaited)
        ):
            self._refusal_log.waits_for_rate()
        self.place_found()

    def _tell_what_was_tried_out(self, client: Any) -> None:
        reasons = self.admission.tried_out[:]
        self.admission.tried_out.clear()
        for reason in reasons:
            self._refusal_log.in_dry_run(client, reason)

    # Those who wait.

    def held_connected(self, connection: Any) -> None:
        """The transport of one that has to wait is there."""
        del self.held.unconnected[connection.id]
        if self.is_closed:
            self._dismiss(connection, Reason.UNSERVED)
        else:
            self.held.waiting.append(connection)
            self.place_found()

    def place_found(self) -> None:
        """Let in who waits no more; then gates may look whether more may come."""
        waiting, too_early = self.held.waiting, self.held.too_early
        while waiting and not self.is_closed:
            connection = waiting[0]
            if self.is_paused and connection.id > self.held.last_before_pause:
                break
            if connection.id in too_early:
                if self.rate_wait.timer is not None:
                    break
                too_early.discard(connection.id)
                self._take_token(connection)
                if self.is_full and self._evicts:
                    self._make_room(0)
                # Whoever was told of that may have done anything: look again.
            elif self.is_full:
                break
            else:
                waiting.popleft()
                self._owner.admit_held(connection)
        self.on_place()

    def _refuse_held(self, reason: Reason) -> None:
        while self.held.waiting:
            self._dismiss(self.held.waiting.popleft(), reason)

    def _dismiss(self, connection: Any, reason: Reason) -> None:
        self._waits_no_more(connection, reason)
        connection.close_now()

    def _waits_no_more(self, connection: Any, reason: Reason) -> None:
        """One that never had a slot is sent away, and counts for nobody any more."""
        self.held.too_early.discard(connection.id)
        self.admission.leave(connection)
        self._refusal_log.refused(connection.peer, reason)

    def forget_unconnected(self, id: int) -> None:
        """Whoever was to connect the newest connection has failed to."""
        connection = self.held.unconnected.pop(id, None)
        if connection is not None:
            self._waits_no_more(connection, Reason.UNSERVED)
        self.is_judged = False

    def broken(self) -> list[str]:
        """What does not hold, and ought to."""
        settings, live = self._owner.settings, self._slots.live
        held = {c.id for c in self.held.all}
        self.admission.invariant(held.union(live))
        is_waiting = self.rate_wait.timer is not None
        checks = {
            "no timer when it is closed": not (self.is_closed and is_waiting),
            "a timer only for accept_rate": not is_waiting
            or (
                settings.accept_rate is not None
                and "accept_rate" not in settings.dry_run
            ),
            "who is held is not live": held.isdisjoint(live),
        }
        broken = [check for check, holds in checks.items() if not holds]
        return [*broken, *self.eviction.broken(), *self.held.broken()]


def _nothing() -> None:
    """What is called while nobody has asked to be."""
