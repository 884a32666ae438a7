"""
The tests that may differ: those that look for the transport itself among the main
reactor's own readers and writers.
"""

from __future__ import annotations

#: A test's full name, and why it differs. A test that is made for each reactor has
#: a name for each.
EXPECTED: dict[str, str] = {
    "twisted.internet.test.test_tcp"
    f".TCPConnectionTestsBuilder_{reactor}Tests.test_resumeProducing": (
        "it looks for the transport among reactor.getReaders(); there stands the "
        "sub-reactor, which reads for it"
    )
    for reactor in (
        "AsyncioSelectorReactor",
        "EPollReactor",
        "PollReactor",
        "SelectReactor",
        "ThreadedSelectReactor",
    )
}

#: More names than this, and it is no longer Twisted's suite that judges.
MOST_EXPECTED = 10
