from twisted.internet.threads import deferToThread


def greet(address, sock):
    return deferToThread(talk, sock)


def talk(sock):
    """Blocking code, in a thread of its own."""
    sock.setblocking(True)
    sock.sendall(b"Who is there?\n")
    with sock.makefile("rb") as lines:
        name = lines.readline()
    sock.sendall(b"Hello, " + name)
