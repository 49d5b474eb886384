"""What the loopback test servers share: routing, JSON answers, streamed bodies and faults made to order.

Serves HTTP/1.1 with keep-alive on 127.0.0.1, one thread a connection.
Doesn't serve TLS, compression, or request bodies without a Content-Length.
"""

import json
import logging
import math
import random
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, Literal, Self
from urllib.parse import parse_qs, unquote

log = logging.getLogger(__name__)
CHUNK = 1 << 20
STALL = threading.TIMEOUT_MAX


@dataclass
class Fault:
    """Spoils the next `times` requests that it matches (math.inf: all of them), after the first `skip`.

    status: answer with it at once; the request then has no effect.
    status="drop": close the connection without an answer, and without an effect either. With `after`, let the
        request take effect and cut the answer's body after that many bytes: the commit lands unheard.
    delay: seconds to wait first; with no status the request is served as usual after that. STALL: never.
    """

    method: str  # "*" is any
    path: str  # regular expression, searched in the quoted path, without the query
    status: int | Literal["drop"] | None = None
    times: float = 1
    delay: float = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = None
    after: int | None = None
    skip: int = 0

    def matches(self, request: "Request") -> bool:
        fits = self.method in ("*", request.method) and re.search(self.path, request.path)
        return self.times > 0 and bool(fits)


def chance_fault(chance: random.Random, path: str = "", within: int = 30) -> Fault:
    """A fault that begins at one of the next `within` requests to `path`, and passes or stays."""
    kinds: list[dict[str, Any]] = [{"delay": STALL}, {"delay": 0.5}]
    kinds += [{"status": "drop"}, {"status": "drop", "after": chance.randrange(20)}]
    kinds += [{"status": status} for status in (401, 429, 500, 503)]
    times = chance.choice([1, 1, 3, math.inf])
    return Fault("*", path, times=times, skip=chance.randrange(within), **chance.choice(kinds))


@dataclass
class FileSlice:
    """A part of a file as an answer's body, never whole in memory."""

    path: Path
    start: int
    size: int

    def chunks(self) -> Iterator[bytes]:
        left = self.size
        with self.path.open("rb") as file:
            file.seek(self.start)
            while left > 0:
                data = file.read(min(CHUNK, left))
                left -= len(data)
                yield data


@dataclass
class Reply:
    """An answer; a body that is neither bytes nor a FileSlice goes out as JSON."""

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.body, bytes | FileSlice):
            self.headers = {"Content-Type": "application/json", **self.headers}
            self.body = json.dumps(self.body).encode()

    @property
    def size(self) -> int:
        return self.body.size if isinstance(self.body, FileSlice) else len(self.body)

    def chunks(self) -> Iterator[bytes]:
        return self.body.chunks() if isinstance(self.body, FileSlice) else iter([self.body])


class HttpError(Exception):
    """Raised by a handler to answer with an error."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.reply = Reply({"error": message}, status, {"X-Error-Message": message, **named})


def byte_range(header: str, size: int) -> tuple[int, int]:
    """The (start, stop) that a Range header asks for."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header)
    if not match or match.groups() == ("", ""):
        raise HttpError(400, f"Range not understood: {header}")
    first, last = match.groups()
    start = int(first) if first else max(0, size - int(last))
    stop = min(size, int(last) + 1) if first and last else size
    if start >= stop:
        raise HttpError(416, "Range not satisfiable", Content_Range=f"bytes */{size}")
    return start, stop


class Request:
    """One request: `params` are the route's named groups, unquoted; the body is read at most once."""

    def __init__(self, handler: BaseHTTPRequestHandler) -> None:
        # Whole, not only its path: what a client sends to us as its proxy matches no route.
        self.path, _, query = handler.path.partition("?")
        self.method, self.query = handler.command, parse_qs(query)
        self.headers = handler.headers
        self.params: dict[str, str] = {}
        self._file, self._left = handler.rfile, int(self.headers.get("Content-Length", 0))

    def chunks(self) -> Iterator[bytes]:
        while self._left:
            data = self._file.read(min(CHUNK, self._left))
            if not data:
                raise ConnectionError("the client went away in the middle of a body")
            self._left -= len(data)
            yield data

    def read(self) -> bytes:
        return b"".join(self.chunks())

    def json(self) -> Any:
        return json.loads(self.read())

    def form(self) -> dict[str, list[str]]:
        return parse_qs(self.read().decode())

    def file_reply(self, path: Path, headers: dict[str, str]) -> Reply:
        """The file, or the part of it that a Range header asks for."""
        size, wanted = path.stat().st_size, self.headers.get("Range")
        if wanted is None:
            return Reply(FileSlice(path, 0, size), 200, headers)
        start, stop = byte_range(wanted, size)
        part = {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
        return Reply(FileSlice(path, start, stop - start), 206, {**headers, **part})

    def drain(self) -> None:
        # What is left of a body would be taken for the next request of the connection.
        for _ in self.chunks():
            pass


class LoopbackServer:
    """Base of a test server: subclasses fill `routes` with (method, path's regular expression, handler)."""

    routes: ClassVar[tuple[tuple[str, str, Callable[[Any, Request], Reply]], ...]] = ()

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.RLock()
        self.stopped = threading.Event()
        self._http = _HttpServer(self)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the server, as if its machine were gone; once more does nothing."""
        self.stopped.set()  # what a fault delays isn't served after this
        self._http.shutdown()
        self._http.server_close()
        for connection in list(self._http.connections):
            # Kept-alive connections would go on being served by their threads.
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def take_fault(self, request: Request) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.matches(request):
                    if fault.skip == 0:
                        fault.times -= 1
                        return fault
                    fault.skip -= 1
            return None

    def dispatch(self, request: Request) -> Reply:
        wanted = "GET" if request.method == "HEAD" else request.method
        try:
            for method, pattern, handler in self.routes:
                match = re.fullmatch(pattern, request.path) if method == wanted else None
                if match:
                    request.params = {
                        name: unquote(value or "") for name, value in match.groupdict().items()
                    }
                    return handler(self, request)
            # 501, as the clients retry the other 5xx and read meaning into 404.
            raise HttpError(501, f"the test server doesn't serve {request.method} {request.path}")
        except HttpError as error:
            return error.reply
        except ConnectionError:
            raise
        except Exception as error:
            log.exception("the test server failed on %s %s", request.method, request.path)
            return Reply({"error": f"the test server failed: {error!r}"}, 501)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "_HttpServer"

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def serve(self) -> None:
        request, app = Request(self), self.server.app
        app.requests.append((request.method, request.path))
        fault = app.take_fault(request) or Fault("*", "")
        stopped = app.stopped.wait(fault.delay)
        if stopped or (fault.status == "drop" and fault.after is None):
            self.close_connection = True
            return
        if isinstance(fault.status, int):
            reply = Reply(fault.body or {"error": "injected"}, fault.status, dict(fault.headers))
        else:
            reply = app.dispatch(request)
        request.drain()
        self.send(reply, fault.after)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_CONNECT = serve

    def send(self, reply: Reply, limit: int | None) -> None:
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(reply.size)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        left = reply.size if limit is None else limit
        for chunk in reply.chunks():
            self.wfile.write(chunk[:left])
            left -= min(left, len(chunk))
        self.close_connection = self.close_connection or limit is not None


class _HttpServer(ThreadingHTTPServer):
    request_queue_size = (
        64  # the default 5 makes a client's parallel connections wait a second each
    )

    def __init__(self, app: LoopbackServer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.app = app
        self.connections: set[socket.socket] = set()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)
