"""
Which of Twisted's tests are run, and on which reactors.

They are those in which a port accepts a connection, found by counting, and the
endpoints' and TLS's own, which use in-memory transports. Left out are

- test_core, test_fdset, test_posixbase, test_sigchld, test_socket, test_http,
  test_webclient, test_basic and whatever else accepts nothing through a port (stub
  ports, clients, processes, adopted connections);
- of bigger modules the classes that accept nothing. On the asyncio reactor the mere
  cleaning up after a test takes 50 ms, and test_sslverify makes keys for 20 s;
- of test_ftp the copies of one class for other ways to name the same port;
- Conch's: 5 s a reactor, for plain TCP and programs that must be installed.
"""

from __future__ import annotations

from dataclasses import dataclass


def _of(module: str, *names: str) -> tuple[str, ...]:
    """Classes or tests of a module."""
    return tuple(f"{module}.{name}" for name in names)


#: Tests that make a test case for each reactor there is (ReactorBuilder), or that
#: need none. They run once.
EACH = (
    "twisted.internet.test.test_endpoints",
    "twisted.internet.test.test_newtls",
    "twisted.internet.test.test_tcp",
    "twisted.internet.test.test_tls",
    "twisted.internet.test.test_unix",
    "twisted.protocols.test.test_tls",
)

#: Tests of the global reactor. They run on each.
GLOBAL = (
    *_of(
        "twisted.mail.test.test_imap",
        "FetchSearchStoreTests",
        "NewFetchTests",
        "NewStoreTests",
        "TLSTests",
    ),
    *_of("twisted.mail.test.test_pop3client", "POP3TLSTests", "POP3TimeoutTests"),
    *_of(
        "twisted.mail.test.test_smtp",
        "AuthTests",
        "SMTPClientTests",
        "SMTPSenderFactoryRetryTests",
        "TLSTests",
    ),
    *_of("twisted.names.test.test_names", "ServerDNSTests"),
    *_of("twisted.spread.test.test_pb", "NSPTests", "NewStyleCachedTests"),
    *_of(
        "twisted.test.test_amp",
        "LiveFireTLSTests",
        "PlainVanillaLiveFireTests",
        "WithServerTLSVerificationTests",
    ),
    *_of("twisted.test.test_application", "InternetTests"),
    *_of(
        "twisted.test.test_ftp",
        "BasicFTPServerTests",
        "FTPServerAdvancedClientTests",
        "FTPServerPasvDataConnectionTests",
        "FTPServerPortDataConnectionTests",
    ),
    *_of("twisted.test.test_loopback", "LoopbackTCPTests", "LoopbackUNIXTests"),
    *_of("twisted.test.test_policies", "ThrottlingTests"),
    "twisted.test.test_protocols",
    "twisted.test.test_ssl",
    *_of(
        "twisted.test.test_sslverify",
        "OpenSSLOptionsECDHIntegrationTests",
        "OpenSSLOptionsTests.test_allowedAnonymousClientConnection",
        "OpenSSLOptionsTests.test_failedCertificateVerification",
        "OpenSSLOptionsTests.test_refusedAnonymousClientConnection",
        "OpenSSLOptionsTests.test_successfulCertificateVerification",
        "OpenSSLOptionsTests.test_successfulSymmetricSelfSignedCertificateVerification",
        "OpenSSLOptionsTests.test_verification",
    ),
    "twisted.test.test_tcp",
    "twisted.test.test_tcp_internals",
    "twisted.test.test_unix",
    *_of("twisted.web.test.test_cgi", "CGIScriptTests", "CGITests"),
    *_of("twisted.web.test.test_distrib", "DistribTests"),
    *_of("twisted.web.test.test_http2", "EndToEndTests"),
    "twisted.web.test.test_xmlrpc",
    *_of("twisted.words.test.test_service", "PBProtocolTests"),
)

#: The global reactors, by trial's short names.
REACTORS = ("epoll", "asyncio", "poll", "select")


@dataclass(frozen=True, slots=True)
class Group:
    """
    Tests that run in one process.

    :param name: what ``--reactor`` calls it.
    :param reactor: the global reactor.
    :param tests: the modules, classes or tests.
    """

    name: str
    reactor: str
    tests: tuple[str, ...]


def groups(names: list[str], only: list[str]) -> list[Group]:
    """
    What to run.

    :param names: the groups: ``each`` or a reactor; none for all.
    :param only: the modules, classes or tests; none for all. They are looked for
        among those listed here, or taken as they are when they are none of these,
        on every global reactor.
    """
    every = [
        Group("each", REACTORS[0], EACH),
        *(Group(reactor, reactor, GLOBAL) for reactor in REACTORS),
    ]
    chosen = []
    for group in every:
        if names and group.name not in names:
            continue
        if not only:
            chosen.append(group)
            continue
        tests: list[str] = []
        for wanted in only:
            listed = [test for test in group.tests if is_in(test, wanted)]
            if listed:
                tests += listed
            elif any(is_in(wanted, test) for test in group.tests) or (
                group.name != "each" and not any(is_in(wanted, test) for test in EACH)
            ):
                tests.append(wanted)
        if tests:
            chosen.append(Group(group.name, group.reactor, tuple(tests)))
    return chosen


def is_in(test: str, module: str) -> bool:
    """Whether a test, class or module is a module or class, or within it."""
    return test == module or test.startswith(module + ".")
