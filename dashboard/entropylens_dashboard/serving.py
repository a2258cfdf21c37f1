"""Start the dashboard: from the command line, under gunicorn, or in a notebook."""

import errno
import html
import ipaddress
import logging
import os
import secrets
import socket
import threading
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import flask
import waitress
from dash import Dash

from entropylens.errors import EntropyLensError
from entropylens_dashboard.library import Library
from entropylens_dashboard.security import LARGEST_BODY, checked_prefix, checked_token, guard

__all__ = ["Frame", "create_server", "serve", "show"]

PORTS: Final = 20
"""How many ports are tried, from the one asked for on."""
THREADS: Final = 8
"""That answer requests."""
TOKEN_VARIABLE: Final = "ENTROPYLENS_TOKEN"

_NOTEBOOKS: Final = tuple(
    f"{scheme}://{host}:*" for scheme in ("http", "https") for host in ("localhost", "127.0.0.1")
)
_shown: "dict[Path, _Background]" = {}
_showing: Final = threading.Lock()


def create_server(
    folder: str | Path,
    *,
    token: str | None = None,
    prefix: str = "/",
    allowed_hosts: Sequence[str] = (),
    frame_ancestors: Sequence[str] = ("'self'",),
) -> flask.Flask:
    """The guarded dashboard as a WSGI application, ready for any server.

    ``gunicorn -w 4 'entropylens_dashboard:create_server("runs/")'`` runs it in four processes.
    Nobody here knows the address that gunicorn listens on: without a token, only requests that
    call this machine localhost or 127.0.0.1 are served, and those of ``allowed_hosts``.

    Args:
        folder: Holds the runs, in folders below too; is only read.
        token: At least 16 characters; else ``ENTROPYLENS_TOKEN`` of the environment; else none.
        prefix: Path that all addresses begin with.
        allowed_hosts: More names by which the dashboard may be called where there is no token.
        frame_ancestors: Who may frame it, as a Content-Security-Policy names them.

    Returns:
        The application.

    Raises:
        EntropyLensError: There is no such folder, or the token is too short.
    """
    return _guarded(
        folder,
        checked_prefix(prefix),
        token=_wanted_token(token),
        allowed_hosts=allowed_hosts,
        frame_ancestors=frame_ancestors,
    )


def serve(
    folder: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8050,
    token: str | None = None,
    prefix: str = "/",
    allowed_hosts: Sequence[str] = (),
    open_browser: bool = False,
) -> None:
    """Serve the dashboard until Ctrl-C, and say where it is.

    On a loopback address no token is needed; who shares the machine can then look, so give one
    there. On any other address a token is demanded: the one given, else ``ENTROPYLENS_TOKEN`` of
    the environment, else a fresh one, which is printed once. The connection itself is not
    encrypted: use ``ssh -L``, or a proxy that speaks HTTPS.

    Args:
        folder: Holds the runs, in folders below too; is only read.
        host: Address to listen on.
        port: Port to listen on; where it is taken, the next free one of 20. 0 takes any.
        token: At least 16 characters.
        prefix: Path that all addresses begin with.
        allowed_hosts: More names by which the dashboard may be called where there is no token.
        open_browser: Open the page.

    Raises:
        EntropyLensError: There is no such folder, the token is too short, or nothing can listen at
            the address.
    """
    given, prefix = _wanted_token(token), checked_prefix(prefix)
    fresh = None if given or _is_loopback(host) else secrets.token_urlsafe(32)
    names = (*allowed_hosts, host)
    server = _guarded(folder, prefix, token=given or fresh, allowed_hosts=names)
    with _listen(host, port) as listener:
        bound = listener.getsockname()[1]
        url = f"http://{_browsable(host)}:{bound}{prefix}"
        _say(_greeting(folder, url, fresh, is_open=given is None and fresh is None))
        if port not in (0, bound):
            _say([f"port    {port} was taken"])
        if _is_loopback(host):
            _say([f"remote  ssh -L {bound}:{_browsable(host)}:{bound} {socket.gethostname()}"])
        if open_browser:
            webbrowser.open(url)  # without the token: other users can see a program's arguments
        _wsgi(server, listener).run()


@dataclass(frozen=True)
class Frame:
    """A dashboard inside a notebook."""

    url: str
    """Where it is; a browser on the same machine can open it too."""
    height: int
    """Pixels."""

    def _repr_html_(self) -> str:
        url = html.escape(self.url, quote=True)
        return (
            f'<iframe src="{url}" title="entropylens" width="100%" height="{int(self.height)}" '
            f'style="border: 0" allow="clipboard-write; fullscreen"></iframe>'
            f'<p><a href="{url}" target="_blank" rel="noopener">{url}</a></p>'
        )


@dataclass(frozen=True)
class _Background:
    thread: threading.Thread
    url: str


def show(folder: str | Path, *, height: int = 800) -> Frame:
    """The dashboard in a notebook's output, served by a thread of the notebook's process.

    The browser has to be on the machine of the kernel, or reach its port by ``ssh -L``. Called
    again for the same folder it shows the server that is there.

    Args:
        folder: Holds the runs, in folders below too; is only read.
        height: Pixels.

    Returns:
        What the notebook shows.

    Raises:
        EntropyLensError: There is no such folder.
    """
    place = Path(folder).expanduser().resolve()
    with _showing:
        known = _shown.get(place)
        if known is None or not known.thread.is_alive():
            known = _shown[place] = _start(place)
    return Frame(known.url, height)


def _start(folder: Path) -> _Background:
    frames = ("'self'", *_NOTEBOOKS, "vscode-webview:")
    server = _guarded(folder, "/", token=None, allowed_hosts=(), frame_ancestors=frames)
    listener = _listen("127.0.0.1", 0)
    wsgi = _wsgi(server, listener)
    thread = threading.Thread(target=wsgi.run, name="entropylens dashboard", daemon=True)
    thread.start()
    # Jupyter calls itself localhost: a frame of the same name may use the browser's storage.
    return _Background(thread, f"http://localhost:{listener.getsockname()[1]}/")


def _guarded(folder: str | Path, prefix: str, *, token: str | None, **guarding: Any) -> flask.Flask:
    from entropylens_dashboard.app import create_app

    app = create_app(folder, prefix=prefix)
    hashes = _script_hashes(app, prefix)
    guard(app.server, token=token, prefix=prefix, script_hashes=hashes, **guarding)
    return app.server


def _script_hashes(app: Dash, prefix: str) -> Sequence[str]:
    """Dash registers its last inline scripts on the way to the first answer: go that way once."""
    with app.server.test_request_context(prefix):
        app.server.preprocess_request()
    return app.csp_hashes()


def _wanted_token(given: str | None) -> str | None:
    token = given or os.environ.get(TOKEN_VARIABLE) or None
    return None if token is None else checked_token(token)


# -- listening ------------------------------------------------------------------------------------


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket at the port, or at the next free one."""
    if not 0 <= port <= 65_535:
        raise ValueError(f"dashboard: expected a port from 0 to 65535, got {port}")
    last = min(port + PORTS, 65_536) if port else 1
    for candidate in range(port, last):
        try:
            known = socket.getaddrinfo(host, candidate, type=socket.SOCK_STREAM)
            family, _, _, _, address = min(known, key=lambda one: one[0] != socket.AF_INET)
            return socket.create_server(address, family=family, backlog=128)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                why = str(error.strerror).partition(" (")[0]
                raise EntropyLensError(
                    f"dashboard: expected an address of this machine to listen at, got "
                    f"{host}:{candidate} ({why}); use --host 127.0.0.1 and a port "
                    f"from 1024 on"
                ) from None
    raise EntropyLensError(
        f"dashboard: expected a free port from {port} to {last - 1}, found none; use another --port"
    )


def _wsgi(server: flask.Flask, listener: socket.socket) -> Any:
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # warns of any short queue
    return waitress.create_server(
        server,
        sockets=[listener],
        threads=THREADS,
        ident=None,
        max_request_body_size=2 * LARGEST_BODY,  # up to here Flask says it, with our headers
        clear_untrusted_proxy_headers=False,  # read only to mark the cookie as secure
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _browsable(host: str) -> str:
    """The address as a browser takes it; everywhere is called by this machine's name."""
    if host in ("", "0.0.0.0", "::"):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host


# -- what is said ---------------------------------------------------------------------------------


def _greeting(folder: str | Path, url: str, fresh: str | None, *, is_open: bool) -> list[str]:
    count = len(Library(folder).entries())
    lines = [f"folder  {folder} ({count} {'run' if count == 1 else 'runs'})"]
    if fresh is not None:
        lines += [f"open    {url}?token={quote(fresh)}"]
        lines += ["token   made for this address, which others can reach; it is shown only here"]
    else:
        lines += [f"open    {url}"]
        lines += ["token   none: only this machine can reach it" if is_open else "token   as given"]
    return [*lines, "stop    Ctrl-C"]


def _say(lines: Sequence[str]) -> None:
    for line in lines:
        print(line, flush=True)
