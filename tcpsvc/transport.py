"""
Server-side transports that say how much they have sent.

Twisted's transports tell their producer when they have sent everything, and
nobody how far they are. A slow client's bytes have an age, and a flush has an
end, before everything later is sent too (spec S5, S6). ``Port.transport`` is
Twisted's documented hook for the class of the transports.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any


class _Counting:
    """
    Mixed into a transport class.

    :ivar total_sent: how many bytes the kernel has taken.
    :ivar on_sent: called after each send.
    """

    total_sent = 0
    on_sent: Callable[[], None] | None = None

    def writeSomeData(self, data: Any) -> Any:
        """Send, and count."""
        sent = super().writeSomeData(data)  # type: ignore[misc]
        if isinstance(sent, int) and sent > 0:
            self.total_sent += sent
        return sent

    def doWrite(self) -> Any:
        """Send, and tell."""
        result = super().doWrite()  # type: ignore[misc]
        if self.on_sent is not None:
            self.on_sent()
        return result


@cache
def counting(transport_class: type) -> type:
    """The class of a port's transports, made to count."""
    if not hasattr(transport_class, "writeSomeData"):
        return transport_class
    return type(f"Counting{transport_class.__name__}", (_Counting, transport_class), {})
