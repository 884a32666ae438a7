async def divide(address, reader, writer):
    async for line in reader:
        a, b = line.split()
        writer.write(b"%d\n" % (int(a) // int(b)))
        await writer.drain()


async def divide_politely(address, reader, writer):
    async for line in reader:
        try:
            a, b = line.split()
            writer.write(b"%d\n" % (int(a) // int(b)))
        except (ValueError, ZeroDivisionError) as error:
            writer.write(b"error: %s\n" % str(error).encode())
        await writer.drain()
