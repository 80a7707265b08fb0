"""A small web page on this machine where one drops photos and sees tags, probabilities and heat maps."""

from __future__ import annotations

import base64
import importlib.resources
import io
import json
import logging
import secrets
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

from fedmpt.edge_client.heatmaps import layer
from fedmpt.edge_client.images import PhotoError, decode_pixels
from fedmpt.edge_client.tagger import Tagger
from fedmpt.protocol.errors import FedmptError

MAXIMUM_UPLOAD = 64 << 20  # bytes
CONCURRENT_PHOTOS = 4  # uploads held in memory at a time; others wait
SHOWN_TAGS = 8  # filled up with the most probable labels below their thresholds
PHOTO_SIZE = 448  # pixels
HEATMAP_SIZE = 224
TIMEOUT = 30  # seconds that a silent connection is kept
LOOPBACK = ("127.0.0.1", "localhost")
STAY = "They stay on this machine."
LEAVE = "They go, unencrypted, to the machine that serves this page; it keeps none."

logger = logging.getLogger(__name__)


class ServeError(FedmptError):
    """The page cannot be served at this address."""


def open_server(tagger: Tagger, host: str = "127.0.0.1", port: int = 0) -> ThreadingHTTPServer:
    """Listen at ``host`` and ``port`` (0: any free one); the caller runs ``serve_forever`` and ``server_close``.

    On the loopback address requests whose ``Host`` is not this machine are refused, so that no web site can reach
    the server by a name of its own (DNS rebinding).

    Raises:
        ServeError: the port is in use or the address is not this machine's.
    """
    page = importlib.resources.files("fedmpt.edge_client").joinpath("data/tagger.html").read_text("utf-8")
    slots = threading.BoundedSemaphore(CONCURRENT_PHOTOS)

    class Handler(_Handler):
        pass

    Handler.tagger, Handler.page, Handler.slots, Handler.loopback = tagger, page, slots, host in LOOPBACK
    try:
        return _Server((host, port), Handler)
    except (OSError, OverflowError) as error:
        raise ServeError(f"cannot serve at {host}:{port} ({error}); choose another --port") from error


def examine(tagger: Tagger, photo: bytes, name: str) -> dict[str, Any]:
    """What the page shows of one encoded photo: its crop and the most probable tags, pictures as data URLs.

    Raises:
        PhotoError: the bytes are no photo.
    """
    pixels = decode_pixels(photo, tagger.info.image_size, name)
    prediction = tagger.predict(pixels[None])
    probabilities = prediction.probabilities[0]
    found = tagger.choose(probabilities)
    others = [tag for tag in tagger.choose(probabilities, min_probability=0.0) if tag not in found]
    tags: list[dict[str, Any]] = []
    for label, probability in found + others[: max(0, SHOWN_TAGS - len(found))]:
        index = tagger.info.labels.index(label)
        tag: dict[str, Any] = {
            "label": label,
            "probability": probability,
            "threshold": tagger.info.thresholds[index],
            "found": len(tags) < len(found),
        }
        if prediction.heatmaps is not None:
            tag["heatmap"] = _data_url(layer(prediction.heatmaps[0, index], HEATMAP_SIZE), "PNG")
        tags.append(tag)
    crop = Image.fromarray(decode_pixels(photo, PHOTO_SIZE, name))
    return {"name": name, "photo": _data_url(crop, "JPEG"), "tags": tags}


def _data_url(picture: Image.Image, kind: str) -> str:
    data = io.BytesIO()
    picture.save(data, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def server_bind(self) -> None:
        # The base class looks up its own name, which can hang without a network.
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        if isinstance(sys.exc_info()[1], ConnectionError):
            logger.info("%s went away", client_address)
        else:
            logger.exception("a request of %s failed", client_address)


class _Handler(BaseHTTPRequestHandler):
    tagger: Tagger
    page: str
    slots: threading.BoundedSemaphore
    loopback: bool

    protocol_version = "HTTP/1.1"
    timeout = TIMEOUT

    def do_GET(self) -> None:
        if self._length() != 0 and ("Content-Length" in self.headers or "Transfer-Encoding" in self.headers):
            self.close_connection = True  # a body, which would be taken for the next request
        if not self._is_ours():
            return
        if self.path != "/":
            self._fail(HTTPStatus.NOT_FOUND, "no such page")
            return
        nonce = secrets.token_urlsafe(16)
        description = json.dumps(
            {
                "labels": len(self.tagger.info.labels),
                "precision": self.tagger.info.precision,
                "limit": MAXIMUM_UPLOAD,
            }
        )
        page = self.page.replace("{{nonce}}", nonce).replace("{{tagger}}", description)
        page = page.replace("{{promise}}", STAY if self.loopback else LEAVE)
        policy = (
            f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; img-src data:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        self._send(HTTPStatus.OK, "text/html; charset=utf-8", page.encode(), policy)

    def do_POST(self) -> None:
        if not self._is_ours():
            return
        length = self._length()
        if self.path != "/tag":
            self._fail(HTTPStatus.NOT_FOUND, "no such page")
        elif length is None:
            self._fail(HTTPStatus.LENGTH_REQUIRED, "the size of the photo is missing")
        elif length > MAXIMUM_UPLOAD:
            self._fail(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"larger than {MAXIMUM_UPLOAD >> 20} MB")
        else:
            with self.slots:
                self._tag(self.rfile.read(length))

    def _length(self) -> int | None:
        """The bytes of the body, up to some more than are taken; None if they are not told once and plainly."""
        told = self.headers.get_all("Content-Length", [])
        plain = len(told) == 1 and told[0].isascii() and told[0].isdigit()
        if not plain or "Transfer-Encoding" in self.headers:
            return None
        digits = told[0].lstrip("0")
        return MAXIMUM_UPLOAD + 1 if len(digits) > 20 else int(digits or "0")

    def _tag(self, photo: bytes) -> None:
        try:
            result = examine(self.tagger, photo, "the photo")
        except PhotoError as error:
            self._json(HTTPStatus.UNPROCESSABLE_ENTITY, {"error": error.reason})
        else:
            self._json(HTTPStatus.OK, result)

    def _is_ours(self) -> bool:
        """Refuse what another web site sent through the visitor's browser."""
        if self.headers.defects or len(self.headers.get_all("Host", [])) > 1:
            self._fail(HTTPStatus.BAD_REQUEST, "the request cannot be read")
            return False
        host = self.headers.get("Host", "")
        if self.loopback and host.partition(":")[0] not in LOOPBACK:
            self._fail(HTTPStatus.FORBIDDEN, "this page is served to this machine only")
            return False
        if self.headers.get("Origin", f"http://{host}") != f"http://{host}":
            self._fail(HTTPStatus.FORBIDDEN, "sent by another web site")
            return False
        return True

    def _json(self, status: HTTPStatus, value: Any) -> None:
        self._send(status, "application/json", json.dumps(value).encode())

    def _fail(self, status: HTTPStatus, text: str) -> None:
        self.close_connection = True  # its body, if any, is left unread
        self._json(status, {"error": text})

    def _send(self, status: HTTPStatus, kind: str, body: bytes, policy: str = "default-src 'none'") -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-store",
            **({"Connection": "close"} if self.close_connection else {}),
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        logger.info("%s %s", self.address_string(), format % arguments)
