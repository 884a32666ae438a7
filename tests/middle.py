"""Sockets that stand between a transport and its own, to see or to fail its sends."""

from __future__ import annotations

from typing import Any


class InTheMiddle:
    """Takes the place of a transport's socket."""

    def __init__(self, transport: Any) -> None:
        self._socket = transport.socket
        transport.socket = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)


class CountsSends(InTheMiddle):
    """
    Counts what is sent.

    :ivar sends: how many bytes each time.
    """

    def __init__(self, transport: Any) -> None:
        super().__init__(transport)
        self.sends: list[int] = []

    def send(self, data: Any) -> int:
        sent: int = self._socket.send(data)
        self.sends.append(sent)
        return sent


class FailsSends(InTheMiddle):
    """
    Its next sends fail.

    :param errors: the numbers of the errors.
    """

    def __init__(self, transport: Any, *errors: int) -> None:
        super().__init__(transport)
        self._errors = list(errors)

    def send(self, data: Any) -> int:
        if self._errors:
            raise OSError(self._errors.pop(0), "as the test has it")
        sent: int = self._socket.send(data)
        return sent
