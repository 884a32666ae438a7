from twisted.internet import defer


def patient(clock):
    """A handler that waits half a minute for a name."""

    async def greet(address, reader, writer):
        writer.write(b"What is your name?\n")
        reading = defer.Deferred.fromCoroutine(reader.readline())
        try:
            line = await reading.addTimeout(30, clock)
        except defer.TimeoutError:
            writer.write(b"You have no name.\n")
            return
        writer.write(b"Hello, " + line.strip() + b"!\n")

    return greet
