"""
The documentation holds: every example is run, every shell session shows what it
shows, and the lists that pages give are complete.

A page's shell sessions are run in the order of the page, in a directory that holds
the examples. Servers are started in the background; ``nc`` and ``curl`` are played
by this process, so that neither needs to be installed. Ports are exchanged for free
ones, in commands and examples alike.
"""

from __future__ import annotations

import ast
import http.client
import os
import random
import re
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tcpsvc
from tcpsvc import tap
from tests.daemons import wait_for_end
from tests.support import the_reactor
from tests.tls import client_context, make_certificate

# Examples choose for themselves. Only what is served by twistd is so on the kind of
# reactor that these tests run on: see Shell.serve.
pytestmark = pytest.mark.whatever("engine", "reactor")
by_twistd = pytest.mark.whatever("engine")

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
EXAMPLES = DOCS / "examples"
PAGES = [
    ROOT / "README.rst",
    *sorted(DOCS.glob("*.rst")),
    *sorted(DOCS.glob("*/*.rst")),
]

#: Seconds that anything may take; only a failing test waits so long.
PATIENCE = 20.0

#: What cannot be run here, and why.
NOT_RUN = {
    r"^pip install ": "installs; tests/test_packaging.py and CI do that",
    r"^sudo ": "needs root, and a privileged port; see test_twistd.py",
}
if shutil.which("systemd-socket-activate") is None:
    NOT_RUN[r"^systemd-socket-activate "] = "it is not installed"
    NOT_RUN[r"^nc localhost 8003$"] = "nor is there anything to connect to then"

#: Which lines of the sessions with ``nc`` are typed.
TYPED = {
    "Ada", "Grace", "hello", "stop", "still here",
    "6 3", "1 0", "8 4", "9 3", "nonsense", "hold", "refuse", "resume",
    "I am Ada", "who", "close",
}  # fmt: skip

_BLOCK = re.compile(
    r"^\.\. code-block:: (?P<language>\w+)\n(?:[ ]+:.*\n)*\n(?P<body>(?:[ ]+.*\n|\n)+)",
    re.MULTILINE,
)
_SERVER = re.compile(
    r"twistd (-n|--nodaemon) |^python -m twisted tcpsvc|^python \w+\.py$"
)
_TWISTD = re.compile(r"\btwistd ")
_PORT = re.compile(r"\b8[0-4]\d\d\b")


def blocks(page: Path, *languages: str) -> list[str]:
    """The code blocks of a page in some languages."""
    return [
        textwrap.dedent(found["body"]).strip("\n") + "\n"
        for found in _BLOCK.finditer(page.read_text(encoding="utf-8"))
        if found["language"] in languages
    ]


def sessions(page: Path) -> list[tuple[str, list[str]]]:
    """Each command of a page, and the lines that are shown below it."""
    found: list[tuple[str, list[str]]] = []
    for block in blocks(page, "console", "sh"):
        for line in block.splitlines():
            if "$ " not in block:
                found.append((line, []))
            elif line.startswith("$ "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
    return found


def normal(line: str) -> str:
    """A line without what differs from run to run."""
    line = re.sub(r"^\d{4}-\d\d-\d\dT\S+ ", "", line.strip())
    return re.sub(r"\d+\.\d+s", "0.00s", line)


def holds_in_order(expected: list[str], output: list[str]) -> bool:
    """Whether the expected lines are among the output, in their order."""
    rest = iter([normal(line) for line in output])
    return all(normal(line) in rest for line in expected if line != "...")


def free_port() -> int:
    """A free port that the kernel gives to nobody else meanwhile."""
    while True:
        port = random.randrange(10_000, 30_000)  # Below the ephemeral ones.
        with socket.socket() as probe:
            try:
                probe.bind(("0.0.0.0", port))
            except OSError:
                continue
        return port


class Process:
    """A server in the background, and what it prints."""

    def __init__(
        self,
        command: str,
        directory: Path,
        environ: dict[str, str],
        descriptors: tuple[int, ...] = (),
    ) -> None:
        self.command = command
        self.lines: list[str] = []
        self._process = subprocess.Popen(
            ["bash", "-c", command],
            cwd=directory,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            pass_fds=descriptors,
        )
        self._news = threading.Condition()
        self._is_over = False
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._news:
                self.lines.append(line.rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self._is_over = True
            self._news.notify_all()

    def wait_for(self, pattern: str) -> str:
        """The first line that matches."""

        def found() -> str | None:
            return next((x for x in self.lines if re.search(pattern, x)), None)

        with self._news:
            self._news.wait_for(lambda: found() or self._is_over, PATIENCE)
            line = found()
            assert line is not None, f"{self.command}: no {pattern!r} in {self.lines}"
            return line

    def wait_for_more(self, than: int) -> None:
        """More lines than so many."""
        with self._news:
            more = self._news.wait_for(lambda: len(self.lines) > than, PATIENCE)
            assert more, f"{self.command}: no more than {self.lines}"

    def signal(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def end(self) -> int:
        """Wait for its end; its exit status."""
        try:
            return self._process.wait(PATIENCE)
        finally:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
            self._thread.join()
            assert self._process.stdout is not None
            self._process.stdout.close()


class Shell:
    """Where a page's commands are run, one after the other."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ports: dict[str, int] = {}
        self.servers: list[tuple[Process, list[str]]] = []
        self.left_open: list[socket.socket] = []
        for example in sorted(EXAMPLES.iterdir()):
            if example.is_file():
                text = self.with_ports(example.read_text(encoding="utf-8"))
                (directory / example.name).write_text(text, encoding="utf-8")
        make_certificate(directory)
        self.environ = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def port(self, shown: str | int) -> int:
        """The port that stands for the one that is shown."""
        return self.ports.setdefault(str(shown), free_port())

    def with_ports(self, text: str) -> str:
        return _PORT.sub(lambda found: str(self.port(found[0])), text)

    def serve(self, command: str, expected: list[str] | None = None) -> Process:
        """Start a server and wait until it listens. The one before is stopped."""
        self.stop()
        command = self.with_ports(command)
        if type(the_reactor()).__module__ == "twisted.internet.asyncioreactor":
            command = _TWISTD.sub("twistd --reactor=asyncio ", command)
        process = Process(command, self.directory, self.environ)
        self.servers.append((process, expected or []))
        line = process.wait_for(r"[Ll]istening on ")
        # What the system has chosen stands for the port that is shown.
        for shown in expected or []:
            if "listening on port " in shown:
                self.ports[shown.split()[-1]] = int(line.split()[-1])
        return process

    def connect(self, shown: str | int) -> socket.socket:
        """A client of the server on a port; several ports may open one by one."""
        port = self.port(shown)
        while True:
            said = [len(process.lines) for process, _ in self.servers]
            try:
                return socket.create_connection(("127.0.0.1", port), PATIENCE)
            except ConnectionRefusedError:
                self.servers[-1][0].wait_for_more(said[-1])

    def nc(self, shown: str, lines: list[str]) -> None:
        """Play a session with ``nc``: type what is typed, see what is shown."""
        client = self.connect(shown)
        output = client.makefile("rb")
        last_typed = ""
        for line in lines:
            if line == "^C":
                break
            if line in TYPED and line != last_typed:
                client.sendall(line.encode() + b"\n")
                last_typed = line
            else:
                assert output.readline().decode().rstrip("\r\n") == line
                last_typed = ""
        else:
            if not TYPED & set(lines):
                self.left_open.append(client)
                output.close()
                return
            assert output.read() == b""
        output.close()
        client.close()

    def curl(self, url: str, lines: list[str]) -> None:
        host = re.match(r"http://127\.0\.0\.1:(\d+)/$", url)
        assert host is not None
        self.connect(host[1]).close()
        asked = http.client.HTTPConnection("127.0.0.1", self.port(host[1]), PATIENCE)
        asked.request("GET", "/")
        with asked.getresponse() as answer:
            assert answer.status == 200
            assert answer.read().decode().splitlines() == lines
        asked.close()

    def run(self, command: str, expected: list[str]) -> None:
        """Run a command to its end."""
        done = subprocess.run(
            ["bash", "-c", self.with_ports(command)],
            cwd=self.directory,
            env=self.environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=2 * PATIENCE,
            check=False,
        )
        output = done.stdout.splitlines()
        fails = any("error:" in line for line in expected)
        assert (done.returncode != 0) == fails, done.stdout
        assert holds_in_order(expected, output), done.stdout
        if "..." not in expected:
            assert len(output) == len(expected), done.stdout

    def play(self, command: str, expected: list[str]) -> None:
        """Do with a command of a page as is right for it."""
        if any(re.search(pattern, command) for pattern in NOT_RUN):
            return
        if found := re.fullmatch(r"nc localhost (\d+)", command):
            self.nc(found[1], expected)
        elif found := re.fullmatch(r"curl -s (\S+)", command):
            self.curl(found[1], expected)
        elif _SERVER.search(command):
            self.serve(command, expected)
        else:
            self.run(command, expected)

    def stop(self) -> None:
        """Ctrl-C: stop the server; it has printed what is shown, and ends well."""
        for client in self.left_open:
            client.close()
        while self.servers:
            process, expected = self.servers.pop()
            process.signal()
            status = process.end()
            shown = [self.with_ports(line) for line in expected]
            assert holds_in_order(shown, process.lines), (shown, process.lines)
            # twistd ends by the signal itself, as any program of Twisted's.
            assert status in (0, -signal.SIGTERM), (process.command, process.lines)

    def until_daemons_are_gone(self) -> None:
        """A daemon's pid file goes with it."""
        for path in self.directory.glob("*.pid"):
            try:
                pid = int(path.read_text())
            except FileNotFoundError:
                continue
            wait_for_end(pid)
            assert not path.exists()


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    """A shell in a directory with the examples; what it started is stopped."""
    made = Shell(tmp_path)
    yield made
    made.stop()
    made.until_daemons_are_gone()


# The examples.


def serves_by_twistd(page: Path) -> bool:
    """Whether a session of a page does."""
    commands = [command for command, _ in sessions(page)]
    return any(_SERVER.search(c) and _TWISTD.search(c) for c in commands)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, marks=by_twistd if serves_by_twistd(p) else (), id=p.stem)
        for p in PAGES
        if sessions(p)
    ],
)
def test_the_shell_sessions_of_a_page_show_what_they_show(
    shell: Shell, page: Path
) -> None:
    """Every command is run, in the order of the page."""
    for command, expected in sessions(page):
        shell.play(command, expected)
        if command.startswith("kill ") and shell.left_open:
            # The tutorial's last session: the client that is there can finish.
            process = shell.servers[-1][0]
            line = process.wait_for("draining")
            assert "draining, 1 connection remains, waited 0 s of 30 s" in line
            [client] = shell.left_open
            client.sendall(b"Ada\n")
            assert client.recv(100) == b"Hello, Ada\n"
            assert client.recv(100) == b""


def test_inline_example() -> None:
    """inline.py: a handler with inlineCallbacks that yields a read."""
    from tcpsvc.testing import MemoryServer

    space: dict[str, Any] = {}
    exec((EXAMPLES / "inline.py").read_text(encoding="utf-8"), space)
    client = MemoryServer(space["greet"]).connect()
    client.send(b"Ada\n")
    assert client.received == b"Who is there?\nHello, Ada\n"
    assert client.is_closed


def test_limits_example(shell: Shell) -> None:
    """limits.py: two are served, the third waits until one has left."""
    shell.serve("python limits.py")
    first, second, third = (shell.connect(8004) for _ in range(3))
    third.sendall(b"three\n")
    for client in (first, second):
        client.sendall(b"here\n")
        assert client.recv(100) == b"here\n"
    assert select.select([third], [], [], 0)[0] == []
    first.close()
    assert third.recv(100) == b"three\n"
    second.close()
    third.close()


def test_shedding_example(shell: Shell) -> None:
    """shedding.py: without descriptors it tells who operates it, and the client."""
    process = shell.serve("ulimit -n 24; exec python shedding.py")
    clients = []
    try:
        while True:
            clients.append(shell.connect(8008))
            clients[-1].sendall(b"hello")
            assert clients[-1].recv(5) == b"hello"
    except (ConnectionResetError, BrokenPipeError):
        process.wait_for(r"^Too many open files, with \d+ connections$")
    for client in clients:
        client.close()


def test_embedded_example(shell: Shell) -> None:
    """embedded.py: the handler tells of the application's own timer."""
    shell.serve("python embedded.py")
    with shell.connect(8001) as client:
        assert re.fullmatch(rb"\d+ ticks\n", client.recv(100))


def test_tls_example(shell: Shell) -> None:
    """tls.py: greets over TLS."""
    shell.serve("python tls.py")
    greeted_over_tls(shell.connect(8443))


def greeted_over_tls(plain: socket.socket) -> None:
    """The greeting, over TLS on a connected socket, which is closed."""
    context: ssl.SSLContext = client_context()
    with context.wrap_socket(plain) as client:
        assert client.recv(100) == b"Who is there?\n"
        client.sendall(b"Ada\n")
        assert client.recv(100) == b"Hello, Ada\n"


@by_twistd
def test_tls_and_unix_by_twistd(shell: Shell) -> None:
    """howto/twistd: the session that serves both greets on both."""
    [command] = [
        c for c, _ in sessions(DOCS / "howto" / "twistd.rst") if "hello.sock" in c
    ]
    process = shell.serve(command)
    process.wait_for(r"listening on unix:")
    greeted_over_tls(shell.connect(8443))
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(str(shell.directory / "hello.sock"))
        assert client.recv(100) == b"Who is there?\n"
        client.sendall(b"Ada\n")
        assert client.recv(100) == b"Hello, Ada\n"


def test_systemd_example(shell: Shell) -> None:
    """hello.service: its command serves a socket that systemd hands on."""
    text = (EXAMPLES / "hello.service").read_text(encoding="utf-8")
    found = re.search(r"^ExecStart=\S*/(twistd .*)$", text, re.MULTILINE)
    assert found is not None
    name = re.search(
        r"^FileDescriptorName=(.*)$",
        (EXAMPLES / "hello.socket").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert name is not None
    with socket.socket(socket.AF_INET6) as listening:
        listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listening.bind(("::", 0))
        listening.listen(64)
        shell.ports["8000"] = listening.getsockname()[1]
        # The client comes before the service does, and waits.
        early = shell.connect(8000)
        os.set_inheritable(listening.fileno(), True)
        launcher = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3); "
            "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1', "
            f"LISTEN_FDNAMES={name[1]!r}); os.execvp(sys.argv[2], sys.argv[2:])"
        )
        environ = {**shell.environ, "LAUNCHER": launcher}
        process = Process(
            f'exec 9<&{listening.fileno()}; exec python -c "$LAUNCHER" 9 {found[1]}',
            shell.directory,
            environ,
            (listening.fileno(),),
        )
        shell.servers.append((process, []))
        process.wait_for("listening on ")
        assert early.recv(100) == b"Who is there?\n"
        early.sendall(b"Ada\n")
        assert early.recv(100) == b"Hello, Ada\n"
        early.close()


@by_twistd
def test_the_warning_about_raise_is_true(shell: Shell) -> None:
    """tutorial: a client closes a server that raises; twistd exits with 1."""
    process = shell.serve(
        "twistd -n --pidfile= tcpsvc --handler calculator.divide --port 8003 "
        "--on-handler-error raise"
    )
    with shell.connect(8003) as client:
        client.sendall(b"1 0\n")
        assert client.recv(100) == b""
    assert process.end() == 1
    shell.servers.clear()


def test_draining_example(shell: Shell) -> None:
    """draining.py: the health check fails, a message is answered, the idle leave."""
    process = shell.serve("python draining.py")

    def health() -> bytes:
        with shell.connect(8013) as client:
            return client.recv(100)

    assert health() == b"up\n"
    idle, busy = shell.connect(8012), shell.connect(8012)
    for client in (idle, busy):
        client.sendall(b"hello\n")
        assert client.recv(100) == b"hello\n"
    busy.sendall(b"hal")
    process.signal()
    while health() == b"up\n":
        pass
    with shell.connect(8012) as late:
        late.sendall(b"late\n")
        assert late.recv(100) == b"late\n"
    farewell = b"This server stops. Come back soon!\n"
    assert idle.recv(100) == farewell
    busy.sendall(b"lo\n")
    with busy.makefile("rb") as output:
        assert output.read() == b"hallo\n" + farewell
    for client in (idle, busy):
        client.close()
    process.wait_for("drained: .*2 closed idle; longest wait")


@by_twistd
def test_ticker_example(shell: Shell) -> None:
    """ticker.py: it is told, and says goodbye at once."""
    [command] = [
        c for c, _ in sessions(DOCS / "howto" / "draining.rst") if "ticker" in c
    ]
    process = shell.serve(command)
    with shell.connect(8014) as client:
        assert client.recv(100) == b"tick\n"
        process.signal()
        with client.makefile("rb") as output:
            assert output.read().endswith(b"No more ticks today.\n")
    process.wait_for("drained in 0.0 s: 1 finished; longest wait 0.0 s")


#: Examples that no session runs, and the test that does.
RUN_BY = {
    "inline.py": test_inline_example,
    "limits.py": test_limits_example,
    "shedding.py": test_shedding_example,
    "patient.py": "test_hello_trial.py",
    "hello.service": test_systemd_example,
    "hello.socket": test_systemd_example,
}


def test_every_example_is_shown_and_run() -> None:
    """Each file of docs/examples is included by a page, and run by a test."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    commands = "\n".join(command for page in PAGES for command, _ in sessions(page))
    for example in EXAMPLES.iterdir():
        if not example.is_file():
            continue
        assert f"examples/{example.name}\n" in text, f"{example.name} is not shown"
        named = rf"\b{example.stem}(\.\w+)?\b"
        assert example.name in RUN_BY or re.search(named, commands), (
            f"{example.name} is not run"
        )


# The README, and the pages.


def test_the_readme_shows_examples_as_they_are() -> None:
    """The Python blocks of README.rst are files of docs/examples."""
    examples = {
        e.read_text(encoding="utf-8"): e.name for e in EXAMPLES.iterdir() if e.is_file()
    }
    shown = blocks(ROOT / "README.rst", "python")
    for block in shown:
        assert block in examples, f"README.rst: no example is\n{block}"
    assert examples[shown[0]] == "hello.py"


def test_no_page_has_python_that_is_no_example() -> None:
    """Python in docs/ is included from files, which are run."""
    for page in PAGES[1:]:
        assert blocks(page, "python", "py", "python3") == [], page


def test_no_page_names_what_a_reader_has_not() -> None:
    """No page points outside the repository."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert "../shared" not in text
        assert "/work/" not in text


def test_every_public_name_is_in_the_reference() -> None:
    """tcpsvc.__all__ and tcpsvc.testing.__all__ are in reference.rst."""
    text = (DOCS / "reference.rst").read_text(encoding="utf-8")
    documented = set(
        re.findall(r"^\.\. auto\w+:: (tcpsvc\.[\w.]+)", text, re.MULTILINE)
    )
    assert {f"tcpsvc.{name}" for name in tcpsvc.__all__} <= documented
    from tcpsvc import testing

    assert {f"tcpsvc.testing.{name}" for name in testing.__all__} <= documented


def test_every_option_of_twistd_is_explained() -> None:
    """howto/twistd.rst explains each option, and no other."""
    text = (DOCS / "howto" / "twistd.rst").read_text(encoding="utf-8")
    explained = re.findall(r"^\.\. option:: --(\S+)", text, re.MULTILINE)
    there = [name.rstrip("=") for name in tap.Options().longOpt]
    assert sorted(explained) == sorted(there)


def test_every_clause_that_is_cited_is_in_the_spec() -> None:
    """What docstrings and comments cite as "spec H3" is a clause of spec.rst."""
    text = (DOCS / "spec.rst").read_text(encoding="utf-8")
    clauses = {
        c.upper() for c in re.findall(r"^\.\. _clause-(\w+):", text, re.MULTILINE)
    }
    files = [*(ROOT / "tcpsvc").glob("*.py"), *(ROOT / "tests").glob("*.py")]
    for file in files:
        for cited in re.findall(
            r"\bspec ([A-Z]\d*)\b", file.read_text(encoding="utf-8")
        ):
            assert cited in clauses, f"{file.name} cites {cited}"


def test_every_improvement_has_its_reason() -> None:
    """Each clause with a [+] in spec.rst is in the table of async.rst."""
    text = (DOCS / "spec.rst").read_text(encoding="utf-8")
    reasons = (DOCS / "async.rst").read_text(encoding="utf-8")
    for clause in re.split(r"^\.\. _clause-", text, flags=re.MULTILINE)[1:]:
        name = clause.partition(":")[0].upper()
        if "[+]" in clause:
            assert f"* - :clause:`{name}`" in reasons, f"{name} has no reason"


def imported(file: Path) -> set[str]:
    """Which files of the package a file imports when it is run."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update("__init__" for a in node.names if a.name == "tcpsvc")
        if isinstance(node, ast.ImportFrom) and node.module:
            package, _, module = node.module.partition(".")
            if package == "tcpsvc" and module:
                found.add(module)  # In the engine's folder, "engine.module".
            elif package == "tcpsvc":
                names = {a.name for a in node.names}
                root = ROOT / "tcpsvc"
                files = {n for n in names if (root / f"{n}.py").exists()}
                found.update(files | ({"__init__"} if names - files else set()))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text(encoding="utf-8")))
    return found


def test_imports_point_down_the_list_of_the_design() -> None:
    """design.rst lists every file; each imports only files below it."""
    text = (DOCS / "design.rst").read_text(encoding="utf-8")
    order = re.findall(r"^``([\w/]+)\.py``  ", text, re.MULTILINE)
    root = ROOT / "tcpsvc"
    there = {str(f.relative_to(root).with_suffix("")) for f in root.rglob("*.py")}
    assert sorted(order) == sorted(there)
    modules = [n.removesuffix("/__init__").replace("/", ".") for n in order]
    for place, name in enumerate(order):
        wrong = imported(root / f"{name}.py") - set(modules[place + 1 :])
        assert not wrong, f"{name}.py imports {wrong}, which does not stand below it"
