from twisted.web.server import Site
from twisted.web.static import Data


def make_site():
    return Site(Data(b"Hello, browser!\n", "text/plain"))
