async def greet(address, reader, writer):
    """Ask for a name, and greet."""
    writer.write(b"Who is there?\n")
    name = await reader.readline()
    writer.write(b"Hello, " + name)
