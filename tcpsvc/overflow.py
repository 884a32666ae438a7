"""
What happens to clients that are not let in, as a value: the options ``overflow``
and ``refusal``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Reply:
    """
    A last word to a client that is not let in: it is sent, then the connection is
    closed, orderly. The client may take 5 s; what it sends is discarded.

    :param data: the bytes, at most 4096.
    """

    data: bytes

    def __post_init__(self) -> None:
        if not isinstance(self.data, bytes):
            raise TypeError(f"Reply({self.data!r}): not bytes")
        if not 0 < len(self.data) <= LONGEST_REPLY:
            raise ValueError(
                f"Reply of {len(self.data)} bytes: not 1 to {LONGEST_REPLY}"
            )


#: Bytes. It fits into the kernel's buffer at once.
LONGEST_REPLY = 4096

#: What becomes of a client that comes when ``max_connections`` are there.
Overflow = Literal["hold", "drop", "reset", "evict"] | Reply
OVERFLOWS = ("hold", "drop", "reset", "evict")

#: What becomes of a client that the other limits keep out.
Refusal = Literal["drop", "reset"] | Reply
REFUSALS = ("drop", "reset")


def check_word_or_reply(name: str, value: object, words: tuple[str, ...]) -> None:
    """
    :raises ValueError: it is neither one of the words nor a :class:`Reply`.
    """
    if not (isinstance(value, Reply) or (isinstance(value, str) and value in words)):
        raise ValueError(
            f"{name}={value!r} is not one of {', '.join(map(repr, words))} or a "
            "Reply(bytes)"
        )
