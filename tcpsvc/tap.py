"""
``twistd tcpsvc``: its options, and the service they make.

Whatever can be wrong is found, and whatever can be bound is bound, while the
service is made: before twistd forks and drops its privileges, where an error is
still one line on stderr and an exit status. Nothing is left bound or on disk.
"""

from __future__ import annotations

import atexit
import getopt
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn, cast

from twisted.internet.address import UNIXAddress
from twisted.internet.error import CannotListenError
from twisted.python import usage
from twisted.python.failure import Failure

import tcpsvc
from tcpsvc import tap_limits
from tcpsvc.checks import networks
from tcpsvc.daemon import Daemon
from tcpsvc.drain_options import DRAIN_TIMEOUT
from tcpsvc.loading import load
from tcpsvc.places import places_text
from tcpsvc.service import TcpService
from tcpsvc.settings import ENGINES, EXHAUSTION_POLICIES
from tcpsvc.where import ALL_ADDRESSES, LOCALHOST, WhereToListen


def refuse(message: object) -> NoReturn:
    """One clear line on stderr, and a non-zero exit."""
    text = " ".join(str(message).split())
    sys.stderr.write(f"tcpsvc: error: {text}\n")
    raise SystemExit(1)


def _number(kind: type, name: str, least: float) -> Callable[[str], Any]:
    def coerce(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise ValueError(f"--{name} {text}: not a number") from None
        if not value >= least:
            raise ValueError(f"--{name} {text}: below {least:g}")
        return value

    return coerce


def _drain_timeout(text: str) -> float | None:
    if text == "none":
        return None
    try:
        found: float = _number(float, "drain-timeout", 0)(text)
    except ValueError as error:
        raise ValueError(f"{error}; 'none' is for any time") from None
    return found


def _age_limit(text: str) -> float | None:
    if text == "none":
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise ValueError(
            f"--buffer-age-limit {text}: not above 0 seconds; 'none' is for no limit"
        )
    return value


class Options(usage.Options):
    """The command line of ``twistd tcpsvc``."""

    synopsis = "[options]"
    longdesc = (
        "Serves TCP and UNIX-socket clients with a handler of yours. With no option "
        "it serves the echo handler on a free port of localhost."
    )

    optParameters = [  # noqa: RUF012 (Twisted's form)
        [
            "handler",
            None,
            None,
            "Stream handler: a module.function(address, reader, writer).",
        ],
        ["factory", None, None, "A module.function that returns an IProtocolFactory."],
        [
            "sock-handler",
            None,
            None,
            "Socket handler: a module.function(address, socket).",
        ],
        ["app-dir", None, ".", "Directory from which modules are imported."],
        [
            "max-connections",
            None,
            None,
            "Connections at a time, over all listeners. [default: by ulimit]",
            _number(int, "max-connections", 1),
        ],
        [
            "max-accepts-per-batch",
            None,
            1,
            "Clients accepted in one turn of the reactor.",
            _number(int, "max-accepts-per-batch", 1),
        ],
        [
            "backlog",
            None,
            None,
            "Clients that may wait in the kernel. [default: 64]",
            _number(int, "backlog", 1),
        ],
        [
            "buffer-age-limit",
            None,
            120.0,
            "Seconds after which a client that does not read is closed, or 'none'.",
            _age_limit,
        ],
        [
            "on-exhaustion",
            None,
            "back-off",
            "What becomes of clients when descriptors run out: back-off or shed.",
        ],
        [
            "on-handler-error",
            None,
            "log",
            "What a handler's error does: raise (stop serving), ignore, or log.",
        ],
        [
            "drain-timeout",
            None,
            DRAIN_TIMEOUT,
            "Seconds that a stop waits before it closes what is left, or 'none'.",
            _drain_timeout,
        ],
        [
            "drain-announce",
            None,
            0.0,
            "Seconds that a stop still accepts, for health checks to fail first.",
            _number(float, "drain-announce", 0),
        ],
        [
            "drain-spread",
            None,
            0.0,
            "Seconds over which a stop spreads the closes of what is left.",
            _number(float, "drain-spread", 0),
        ],
        [
            "engine",
            None,
            "auto",
            "What serves connections: auto (tcpsvc itself, if it can), or reactor.",
        ],
        *tap_limits.PARAMETERS,
    ]
    optFlags = [  # noqa: RUF012
        ["drop-incoming", None, "Accept clients and close them at once."],
        ["eof-on-drain", None, "While it stops, a handler that waits reads EOF."],
        ["reuse-port", None, "Let several processes listen on the same --port."],
        ["verbose", None, "Log lines for developers too, of single connections."],
    ]
    compData = usage.Completions(
        optActions={
            "app-dir": usage.CompleteDirs(),
            "socket": usage.CompleteFiles(),
            "on-handler-error": usage.CompleteList(["raise", "ignore", "log"]),
            "engine": usage.CompleteList(list(ENGINES)),
            **tap_limits.COMPLETIONS,
            "on-exhaustion": usage.CompleteList(list(EXHAUSTION_POLICIES)),
        }
    )

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self["listen"] = []
        self["port"] = []
        self["socket"] = []
        self["allow"] = []
        self["deny"] = []

    def opt_listen(self, description: str) -> None:
        """
        Listen on a Twisted endpoint description, such as "tcp:8000",
        "unix:/run/x.sock", "tls:..." or "systemd:...". May be given again.
        """
        self["listen"].append(description)

    def opt_port(self, port: str) -> None:
        """
        Listen on this port of all IPv4 addresses, 0 for a free one. May be given
        again.
        """
        try:
            number = int(port)
        except ValueError:
            number = -1
        if not 0 <= number <= 65535:
            raise usage.UsageError(f"--port {port}: not a port number (0 to 65535)")
        self["port"].append(number)

    def opt_socket(self, path: str) -> None:
        """Listen on a UNIX socket at this path. May be given again."""
        self["socket"].append(path)

    def opt_allow(self, network: str) -> None:
        """
        Let in only clients of this network, such as 10.0.0.0/8. May be given again.
        """
        self["allow"].append(_network("allow", network))

    def opt_deny(self, network: str) -> None:
        """Let in no clients of this network. May be given again."""
        self["deny"].append(_network("deny", network))

    def opt_version(self) -> None:
        """Print the version of tcpsvc, and exit."""
        print(f"tcpsvc {tcpsvc.__version__}")
        raise SystemExit(0)

    def parseOptions(self, options: Any = None) -> None:
        """Parse; what is wrong is one line on stderr, not a page of usage."""
        try:
            super().parseOptions(options)  # type: ignore[no-untyped-call]
        except usage.UsageError as error:
            told = str(error).removeprefix("Parameter type enforcement failed: ")
            if isinstance(error.__context__, getopt.error):
                told += " (see --help)"
            refuse(told)

    def parseArgs(self, *arguments: str) -> None:
        """Nothing but options."""
        if arguments:
            raise usage.UsageError(
                f"{arguments[0]}: not an option; --handler names what serves"
            )

    def postOptions(self) -> None:
        """Look at everything that can be looked at without opening anything."""
        kinds = [
            k for k in ("handler", "factory", "sock-handler") if self[k] is not None
        ]
        if len(kinds) > 1:
            raise usage.UsageError(
                f"--{kinds[0]} and --{kinds[1]}: one handler is enough"
            )
        self["kind"] = kinds[0] if kinds else "handler"
        name = self[self["kind"]] if kinds else "tcpsvc.handlers.echo"
        try:
            self["function"] = load(name, self["app-dir"])
        except ValueError as error:
            raise usage.UsageError(f"--{self['kind']} {error}") from error
        if not callable(self["function"]):
            raise usage.UsageError(f"--{self['kind']} {name!r}: it is not callable")
        if self["on-handler-error"] not in ("raise", "ignore", "log"):
            raise usage.UsageError(
                f"--on-handler-error {self['on-handler-error']}: not one of raise, "
                "ignore, log"
            )
        if self["engine"] not in ENGINES:
            raise usage.UsageError(
                f"--engine {self['engine']}: not one of {', '.join(ENGINES)}"
            )
        if self["eof-on-drain"] and self["kind"] != "handler":
            raise usage.UsageError(f"--eof-on-drain: --{self['kind']} has no reader")
        if self["on-exhaustion"] not in EXHAUSTION_POLICIES:
            raise usage.UsageError(
                f"--on-exhaustion {self['on-exhaustion']}: not one of "
                + ", ".join(EXHAUSTION_POLICIES)
            )
        if self["reuse-port"] and not self["port"]:
            raise usage.UsageError(
                "--reuse-port is for --port; an endpoint of --listen has its own "
                "options"
            )

    def places(self) -> list[WhereToListen[Any, Any]]:
        """
        Everywhere that is to be listened on, by one server.

        :raises ValueError: a path or a description is no good.
        """
        found: list[WhereToListen[Any, Any]] = []
        found += [
            WhereToListen.bind_to(ALL_ADDRESSES, port, reuseport=self["reuse-port"])
            for port in self["port"]
        ]
        found += [_file("socket", path, path) for path in self["socket"]]
        found += [
            _place(description, self["backlog"]) for description in self["listen"]
        ]
        return found or [WhereToListen.bind_to(LOCALHOST, 0)]


def _file(
    option: str, text: str, path: str, mode: int | None = None
) -> WhereToListen[Any, Any]:
    try:
        return WhereToListen.of_file(path, mode=mode)
    except ValueError as error:
        raise ValueError(
            f"--{option} {text}: {str(error).removeprefix('path=')}"
        ) from error


def _as_typed(message: str) -> str:
    """An error of the library's, which begins with the option, as it is typed here."""
    name, equals, rest = message.partition("=")
    if name == "endpoint":
        return f"--listen={rest}"
    if equals and name in _TYPED:
        return f"--{_TYPED[name]}={rest}"
    return message


#: The options by their names in Python.
_TYPED = {
    str(name).replace("-", "_"): str(name)
    for name, *_ in cast("list[list[Any]]", Options.optParameters)
}


def _network(option: str, text: str) -> str:
    try:
        networks(option, [text])
    except ValueError as error:
        raise usage.UsageError(f"--{error}") from error
    return text


def _place(description: str, backlog: int | None) -> WhereToListen[Any, Any]:
    """
    Where a description says. A UNIX path is opened by :mod:`tcpsvc.sockets`:
    Twisted's own lock beside it belongs to the process that made it, and is left
    behind, with the path, once twistd has forked.
    """
    kind, _, rest = description.partition(":")
    path, *words = rest.split(":")
    options = dict(word.partition("=")[::2] for word in words)
    is_plain = "\\" not in rest and set(options) <= {"mode", "lockfile"}
    if kind == "unix" and is_plain:
        mode = options.get("mode", "666")
        if not re.fullmatch("[0-7]{1,4}", mode):
            raise ValueError(f"--listen {description}: mode={mode} is not octal")
        path = path.removeprefix("address=")
        return _file("listen", description, path, mode=int(mode, 8))
    if kind == "unix" and "lockfile" not in options:
        description += ":lockfile=0"
    return WhereToListen.of_endpoint(_with_backlog(description, backlog))


def _with_backlog(description: str, backlog: int | None) -> str:
    """An endpoint's backlog is part of its description."""
    kind = description.partition(":")[0]
    if (
        backlog is None
        or kind not in ("tcp", "tcp6", "unix", "ssl", "tls")
        or ":backlog=" in description
    ):
        return description
    return f"{description}:backlog={backlog}"


def makeService(options: Options) -> Daemon:
    """
    The service that the options ask for, bound as far as it can be.

    What is wrong is one line on stderr and a ``SystemExit``.
    """
    from twisted.internet import reactor

    parent: Any = options.parent or {}
    # Without a log file twistd -n logs to stdout, where the address is to be seen.
    logs_elsewhere = parent.get("logfile") not in (None, "-") or parent.get("syslog")
    prints = bool(parent.get("nodaemon") and logs_elsewhere)
    daemon = Daemon(reactor, prints=prints, is_verbose=bool(options["verbose"]))
    # Until startService twistd may still fail, e.g. at a bad --uid.
    atexit.register(daemon.abandon)
    failures: list[Failure] = []
    where = ""
    try:
        service = _service(options)
        service.setServiceParent(daemon)  # type: ignore[no-untyped-call]
        where = f"{places_text(options.places())}: "
        service.bind().addErrback(failures.append)
        if failures:
            failures[0].raiseException()
    except (ValueError, TypeError, CannotListenError) as error:
        refuse(_as_typed(str(error)))
    except Exception as error:
        # Whatever an endpoint's plugin may raise.
        refuse(f"{where}{type(error).__name__}: {error}")
    return daemon


def _service(options: Options) -> TcpService:
    make: Any = TcpService
    handler = options["function"]
    if options["kind"] == "sock-handler":
        make = TcpService.of_socks
    elif options["kind"] == "factory":
        make = TcpService.of_protocols
        try:
            handler = handler()
        except (Exception, SystemExit) as error:
            raise ValueError(
                f"--factory {options['factory']}: {type(error).__name__}: {error}"
            ) from error
        if inspect.iscoroutine(handler):
            handler.close()
            raise ValueError(
                f"--factory {options['factory']}: it is a coroutine function, not one "
                "that returns an IProtocolFactory"
            )
    limits = tap_limits.limits_of(options)
    places = options.places()
    if options["kind"] == "sock-handler" and all(
        isinstance(place.address, UNIXAddress) for place in places
    ):
        tap_limits.without_defaults(limits)
    common: dict[str, Any] = {
        "on_handler_error": tcpsvc.log_error
        if options["on-handler-error"] == "log"
        else options["on-handler-error"],
        "drain_timeout": options["drain-timeout"],
        "drain_announce": options["drain-announce"],
        "drain_spread": options["drain-spread"],
        "max_connections": options["max-connections"],
        "max_accepts_per_batch": options["max-accepts-per-batch"],
        "drop_incoming_connections": bool(options["drop-incoming"]),
        "engine": options["engine"],
        **limits,
        "on_exhaustion": options["on-exhaustion"],
    }
    if options["backlog"] is not None:
        common["backlog"] = options["backlog"]
    if options["kind"] == "handler":
        common["buffer_age_limit"] = options["buffer-age-limit"]
        common["eof_on_drain"] = bool(options["eof-on-drain"])
    service: TcpService = make(places, handler, **common)
    return service
