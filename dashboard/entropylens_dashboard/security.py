"""Who may see the dashboard, and what a browser may do with it."""

import hashlib
import hmac
import html
import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Final
from urllib.parse import quote, unquote, urlencode

import flask
from dash.exceptions import DependencyException, InvalidResourceError
from werkzeug.exceptions import HTTPException, MethodNotAllowed
from werkzeug.wrappers import Response

from entropylens.errors import EntropyLensError

__all__ = ["checked_prefix", "checked_token", "guard"]

SHORTEST_TOKEN: Final = 16
"""Characters."""
LARGEST_BODY: Final = 2 * 2**20
"""Bytes of a request."""
LARGEST_LOGIN: Final = 64 * 2**10
"""Bytes of a login."""
LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
"""Names by which a browser on this machine, or at the end of an ssh -L, calls it."""

_HOST: Final = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::(\d{1,5}))?")
_PREFIX: Final = re.compile(r"/(?:[A-Za-z0-9_~-][A-Za-z0-9._~-]*/)*")
_PRINTABLE: Final = re.compile(r"[!-~]*")
_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}
_SENTENCES: Final = {
    400: "The request could not be understood.",
    401: "Expected the dashboard's token, got none or another one.",
    404: "There is nothing here.",
    405: "This address does not take that kind of request.",
    413: "The request is too large.",
    415: "Expected JSON.",
}
_STYLE: Final = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 15vh auto 0; max-width: 24rem; padding: 1rem; }
input, button { font: inherit; padding: .5rem; border: 1px solid GrayText; border-radius: .25rem; }
input { box-sizing: border-box; width: 100%; margin: .25rem 0 1rem; }
"""


def guard(
    server: flask.Flask,
    *,
    token: str | None,
    allowed_hosts: Sequence[str],
    prefix: str = "/",
    script_hashes: Sequence[str] = (),
    frame_ancestors: Sequence[str] = ("'self'",),
) -> None:
    """Stand before every route of the server, those of Dash and its assets among them.

    With a token, whoever comes shows it: as ``Authorization: Bearer TOKEN``, on the login page, or
    once as ``?token=TOKEN``; the last two are answered with a cookie. No state is kept: a wrong
    guess costs nothing but its answer. Without one, only requests whose ``Host`` is this machine
    are served, so that no web page can reach the dashboard by a name of its own (DNS rebinding).

    Args:
        server: The Flask server, before its first request.
        token: At least 16 characters, or None.
        allowed_hosts: More names, with or without a port, by which it may be called.
        prefix: The path that all of its addresses begin with.
        script_hashes: Inline scripts that may run, from ``Dash.csp_hashes()``.
        frame_ancestors: Who may frame it.

    Raises:
        EntropyLensError: The token is too short, or the prefix is no path.
    """
    hosts = [name.lower() for name in (*LOOPBACK, *allowed_hosts)]
    token = None if token is None else checked_token(token)
    door = _Door(token, hosts, checked_prefix(prefix))
    policy = _policy(script_hashes, frame_ancestors)

    def finish(response: flask.Response) -> flask.Response:
        response.headers.update(_HEADERS)
        response.headers["Content-Security-Policy"] = policy
        _limit_caching(response, door.prefix)
        return response

    server.config["MAX_CONTENT_LENGTH"] = LARGEST_BODY
    server.before_request_funcs.setdefault(None, []).insert(0, door.answer)
    server.after_request_funcs.setdefault(None, []).insert(0, finish)  # the last to run
    for kind in (Exception, InvalidResourceError):  # Dash answers the second with what it has
        server.register_error_handler(kind, _on_error)


def checked_token(token: str) -> str:
    """The token, if it is long enough not to be guessed.

    Raises:
        EntropyLensError: It is not.
    """
    if len(token) < SHORTEST_TOKEN:
        raise EntropyLensError(
            f"dashboard: expected a token of at least {SHORTEST_TOKEN} characters, got "
            f"{len(token)}; leave it out and one is made"
        )
    return token


def checked_prefix(prefix: str) -> str:
    """The prefix as ``/`` or ``/some/path/``.

    Example:
        >>> checked_prefix("lab/runs")
        '/lab/runs/'

    Raises:
        EntropyLensError: It holds anything but letters, digits and ``._~-``.
    """
    path = f"/{prefix.strip('/')}/" if prefix.strip("/") else "/"
    if not _PREFIX.fullmatch(path):
        raise EntropyLensError(
            f"dashboard: expected a URL prefix such as /lab/, got {prefix!r}; use letters, digits "
            f"and ._~-"
        )
    return path


class _Door:
    """Lets a request in, or answers it."""

    def __init__(self, token: str | None, hosts: Sequence[str], prefix: str) -> None:
        self._token = None if token is None else token.encode("utf-8", "replace")
        self._hosts = hosts
        self.prefix = prefix

    def answer(self) -> Response | None:
        """None lets the request in."""
        if self._token is None:
            return None if self._is_called_by_name() else _misdirected()
        request = flask.request
        if request.path == f"{self.prefix}login":
            request.max_content_length = LARGEST_LOGIN
            if request.method == "POST":
                return self._log_in()
        given = request.args.get("token")
        if request.method == "GET" and given is not None and self._is_token(given):
            return self._let_in(self._asked_for())
        if not self._has_right():
            return self._refuse()
        return self._redirect(self.prefix) if request.path == f"{self.prefix}login" else None

    def _is_called_by_name(self) -> bool:
        match = _HOST.fullmatch(flask.request.environ.get("HTTP_HOST", "").lower())
        if match is None:
            return False
        name, port = match[1].strip("[]"), match[2]
        return name in self._hosts or match[1] in self._hosts or f"{match[1]}:{port}" in self._hosts

    def _has_right(self) -> bool:
        scheme, _, given = flask.request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self._is_token(given.strip(), "latin-1"):
            return True
        cookie = flask.request.cookies.get(self._cookie_name(), "")
        return hmac.compare_digest(
            cookie.encode("utf-8", "replace"), self._derived("cookie").encode()
        )

    def _is_token(self, given: str, encoding: str = "utf-8") -> bool:
        """Headers come as the latin-1 reading of the bytes that were sent."""
        return self._token is not None and hmac.compare_digest(
            given.encode(encoding, "replace"), self._token
        )

    def _derived(self, purpose: str) -> str:
        """What a browser keeps says nothing of the token, and ends with it."""
        assert self._token is not None
        message = f"entropylens dashboard {purpose}".encode()
        return hmac.new(self._token, message, hashlib.sha256).hexdigest()

    def _cookie_name(self) -> str:
        """Differs by token: cookies know no port, and two dashboards may share a host."""
        return f"entropylens-{self._derived('name')[:8]}"

    def _log_in(self) -> Response:
        wanted = self._within(flask.request.form.get("next", ""))
        if self._is_token(flask.request.form.get("token", "")):
            return self._let_in(wanted)
        return _login_page(f"{self.prefix}login", wanted, "That is not the token.")

    def _let_in(self, target: str) -> Response:
        response = self._redirect(target)
        request = flask.request
        response.set_cookie(
            self._cookie_name(),
            self._derived("cookie"),
            path=self.prefix,
            httponly=True,
            samesite="Strict",
            secure=request.is_secure or request.headers.get("X-Forwarded-Proto") == "https",
        )
        return response

    def _redirect(self, target: str) -> Response:
        return flask.Response(status=HTTPStatus.SEE_OTHER, headers={"Location": target})

    def _refuse(self) -> Response:
        if flask.request.method not in ("GET", "HEAD") or _wants_json():
            return _message(401)
        return _login_page(f"{self.prefix}login", self._asked_for())

    def _asked_for(self) -> str:
        """The address that was asked for, without a token."""
        request = flask.request
        if request.method != "GET" or request.path == f"{self.prefix}login":
            return self.prefix
        given = [(key, value) for key, value in request.args.items(multi=True) if key != "token"]
        path = quote(request.path)
        return self._within(f"{path}?{urlencode(given)}" if given else path)

    def _within(self, target: str) -> str:
        """The target if it is a path of this dashboard, else its first page."""
        path = unquote(target.partition("?")[0])
        stays = target.startswith(self.prefix) and _PRINTABLE.fullmatch(target)
        if not stays or "//" in path or "\\" in target or ".." in path.split("/"):
            return self.prefix
        return target


# -- answers --------------------------------------------------------------------------------------


def _wants_json() -> bool:
    request = flask.request
    page = request.path.rpartition("/")[2]
    if request.is_json or request.accept_mimetypes.best == "application/json":
        return True
    return page.startswith("_dash-") or page == "_reload-hash"


def _misdirected() -> flask.Response:
    sentence = (
        "This dashboard does not know itself by the name in the address. Open it as "
        "http://127.0.0.1 with its port, or start it with --allowed-host NAME."
    )
    return _message(421, sentence)


def _message(status: int, sentence: str | None = None) -> flask.Response:
    """One sentence; nothing of the request, the server or the fault."""
    if sentence is None:
        sentence = _SENTENCES.get(status, "It did not work; the server's log says why.")
    if _wants_json():
        response = flask.jsonify(error=sentence)
    else:
        response = flask.Response(_page(f"<p>{html.escape(sentence)}</p>"), mimetype="text/html")
    response.status_code = status
    if status == HTTPStatus.UNAUTHORIZED:
        response.headers["WWW-Authenticate"] = 'Bearer realm="entropylens"'
    return response


def _login_page(action: str, target: str, complaint: str = "") -> flask.Response:
    """A form that needs no script and no file of ours.

    A browser that follows a link from another site holds the cookie back; the page then asks once
    more, on its own account.
    """
    body = f"""<h1>entropylens</h1>
<form method="post" action="{html.escape(action)}">
<label for="token">The token of this dashboard</label>
<input id="token" name="token" type="password" required autofocus autocomplete="current-password">
<input name="next" type="hidden" value="{html.escape(target)}">
<button>Open the dashboard</button>
<p role="alert">{html.escape(complaint)}</p>
</form>"""
    is_from_elsewhere = flask.request.headers.get("Sec-Fetch-Site") == "cross-site"
    asks_again = f'<meta http-equiv="refresh" content="0;url={html.escape(target)}">'
    head = asks_again if is_from_elsewhere and flask.request.method == "GET" else ""
    response = flask.Response(_page(body, head), status=401, mimetype="text/html")
    response.headers["WWW-Authenticate"] = 'Bearer realm="entropylens"'
    return response


def _page(body: str, head: str = "") -> str:
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width">{head}
<link rel="icon" href="data:,">
<title>entropylens</title><style>{_STYLE}</style></head>
<body><main>{body}</main></body>
</html>
"""


def _on_error(error: Exception) -> Response:
    """What happened is for the server's log."""
    if isinstance(error, HTTPException):
        if error.response is not None:
            return flask.make_response(error.response)
        response = _message(error.code or 500)
        if isinstance(error, MethodNotAllowed):
            response.headers["Allow"] = ", ".join(error.valid_methods or ())
        return response
    if isinstance(error, InvalidResourceError | DependencyException):
        return _message(404)
    method, path = flask.request.method, flask.request.path
    flask.current_app.logger.error("%.20r %.500r failed", method, path, exc_info=error)
    return _message(500)


# -- headers --------------------------------------------------------------------------------------


def _policy(script_hashes: Sequence[str], frame_ancestors: Sequence[str]) -> str:
    """Nothing but the server's own files: no evaluation, no other host, no frame."""
    rules = {
        "default-src": "'none'",
        "script-src": " ".join(["'self'", *script_hashes]),
        "style-src": "'self' 'unsafe-inline'",
        "img-src": "'self' data: blob:",
        "font-src": "'self' data:",
        "connect-src": "'self'",
        "frame-ancestors": " ".join(frame_ancestors),
        "base-uri": "'none'",
        "form-action": "'self'",
        "object-src": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _limit_caching(response: flask.Response, prefix: str) -> None:
    """Code may be kept, for good where its address names its version; data may not."""
    path, control = flask.request.path, "no-store"
    is_code = path.startswith((f"{prefix}_dash-component-suites/", f"{prefix}assets/"))
    if is_code and response.status_code in (200, 206, 304):
        age = response.cache_control.max_age
        control = "no-cache" if age is None else f"private, max-age={age}, immutable"
    response.headers["Cache-Control"] = control
