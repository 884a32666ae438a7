"""
Twisted's own test-suite judges the engine's transports.

``python -m tests.conformance`` runs the tests of :mod:`tests.conformance.modules`
twice: as they are, and with tcpsvc's server transports as ``tcp.Port.transport``
and ``unix.Port.transport``, which is where Twisted lets a port have its own. Each
test must end as it did before: pass, skip, fail, error, or fail as expected. That a
test fails on this machine without us, for want of a network or because root may do
everything, does not matter. Those few that may differ are named, with their
reasons, in :mod:`tests.conformance.expected`.

Twisted's tests need more than Twisted: ``pip install -e '.[conformance]'``.
What cannot be imported is no agreement, and ends the command.

::

    # everything
    python -m tests.conformance
    # the tests of the global reactor on one, those that make a reactor themselves
    python -m tests.conformance --reactor asyncio --reactor each
    # some modules, classes or tests
    python -m tests.conformance twisted.test.test_tcp
    # keep the half that does not change for the next time
    python -m tests.conformance --unmodified unmodified.json

It exits with 0 when all agree, with 1 when a test differs that is not named or a
named one does not, and with 2 when it could not judge.

A test that differs is run once more, alone, both ways. When it agrees then, it is
shown but does not count: Twisted has tests that fail now and then. More than a few
of these do count.

:mod:`tests.conformance.stand_ins` has transports that must agree and some that must
not, to judge the judge.
"""
