async def greet(address, reader, writer):
    writer.write(b"Who is there?\n")
    name = await reader.readline()
    writer.write(b"Hello, " + name)
