async def greet(address, reader, writer):
    writer.write(b"What is your name?\n")
    line = await reader.readline()
    name = line.strip()
    writer.write(b"Hello, " + name + b"!\n")
