from twisted.internet.defer import inlineCallbacks


@inlineCallbacks
def greet(address, reader, writer):
    writer.write(b"What is your name?\n")
    line = yield reader.readline()
    name = line.strip()
    writer.write(b"Hello, " + name + b"!\n")
