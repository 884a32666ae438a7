from hello import greet
from pages import make_site
from twisted.application.service import Application, MultiService

from tcpsvc import LOCALHOST, TcpService, WhereToListen, log_error

application = Application("both")
services = MultiService()
services.setServiceParent(application)

TcpService(
    WhereToListen.of_port(8000),
    greet,
    on_handler_error=log_error,
).setServiceParent(services)

TcpService.of_protocols(
    WhereToListen.bind_to(LOCALHOST, 8080),
    make_site(),
    on_handler_error=log_error,
    drain_timeout=5.0,
).setServiceParent(services)
