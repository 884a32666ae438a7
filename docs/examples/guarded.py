from twisted.internet import task

import tcpsvc
from tcpsvc import LOCALHOST, Observer, Reply, Server, WhereToListen


class Log(Observer):
    def connection_refused(self, address, reason):
        print(address.host, "is refused:", reason.value)

    def connection_finished(self, connection):
        print(connection.label, "has ended:", connection.reason.value)


async def main(reactor):
    async def talk(address, reader, writer):
        async for line in reader:
            command = line.decode().strip()
            if command == "who":
                for one in server.connections:
                    writer.write(f"#{one.id} {one.label}\n".encode())
            elif command.startswith("I am "):
                reader.connection.label = command.removeprefix("I am ")
            elif command == "close":
                server.change(deny=["127.0.0.0/8"])
                writer.write(b"closed\n")

    server = await Server.create(
        WhereToListen.bind_to(LOCALHOST, 8018),
        talk,
        on_handler_error=tcpsvc.log_error,
        max_connections=100,
        overflow=Reply(b"busy, come back later\n"),
        max_connections_per_peer=10,
        accept_rate_per_peer="5/s:20",
        first_byte_timeout=30,
        idle_timeout=600,
        refusal=Reply(b"not you\n"),
        observer=Log(),
    )
    print("listening on port", server.listening_on)
    await server.close_finished_and_handlers_determined()


task.react(main)
