import pytest
from pytest_twisted import ensureDeferred
import tcpsvc
from tests.support import LOOPBACK
@ensureDeferred
async def test_it(request):
    want = request.config.getoption("--engine")
    for create in (tcpsvc.Server.create, tcpsvc.Server.create_sock):
        s = await create(LOOPBACK, print, on_handler_error="ignore")
        assert s.describe()["options"]["engine"] == want
        assert (s._factory.settings.engine) == want
        await s.close()

def test_inet(request):
    s = tcpsvc.Server.create_inet(LOOPBACK, print, on_handler_error="ignore")
    assert s._factory.settings.engine == request.config.getoption("--engine")
    import pytest_twisted
    pytest_twisted.blockon(s.close())
