from twisted.internet.defer import inlineCallbacks


@inlineCallbacks
def greet(address, reader, writer):
    writer.write(b"Who is there?\n")
    name = yield reader.readline()
    writer.write(b"Hello, " + name)
