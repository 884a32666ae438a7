from twisted.internet import defer


def patient(clock):
    """A handler that waits half a minute for a name."""

    async def greet(address, reader, writer):
        writer.write(b"Who is there?\n")
        reading = defer.Deferred.fromCoroutine(reader.readline())
        try:
            name = await reading.addTimeout(30, clock)
        except defer.TimeoutError:
            name = b"stranger\n"
        writer.write(b"Hello, " + name)

    return greet
