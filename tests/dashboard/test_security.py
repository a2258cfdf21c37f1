import tracemalloc
from collections.abc import Mapping
from typing import Any

import flask
import pytest
from dash import Dash, Input, Output, dcc, html
from werkzeug.test import EnvironBuilder, TestResponse
from werkzeug.wrappers import Response

from entropylens.errors import EntropyLensError
from entropylens_dashboard.security import checked_prefix, guard

TOKEN = "correct horse battery staple ünïcode"
BEARER = {"Authorization": f"Bearer {TOKEN}".encode().decode("latin-1")}
EVERYWHERE = (
    "/",
    "/any/page",
    "/assets/x.css",
    "/_dash-layout",
    "/_dash-dependencies",
    "/_dash-component-suites/dash/dcc/dash_core_components.js",
    "/_reload-hash",
    "/_favicon.ico",
    "/static/x",
    "/nothing.php",
    "/boom",
    "/login",
    "/login/",
)
SECRET = "/home/me/secret.txt"


def guarded(*, token: str | None = TOKEN, prefix: str = "/", **guarding: Any) -> flask.Flask:
    app = Dash("tiny", url_base_pathname=prefix, add_log_handler=False)
    app.layout = html.Div([dcc.Input(id="in"), html.Div(id="out")])

    @app.callback(Output("out", "children"), Input("in", "value"))  # type: ignore[untyped-decorator]
    def answer(value: str) -> str:
        if value == "boom":
            raise OSError(SECRET)
        return value

    @app.server.route(f"{prefix}boom", methods=["GET", "POST"])  # type: ignore[untyped-decorator]
    def boom() -> str:
        raise OSError(SECRET)

    @app.server.route(f"{prefix}answers", methods=["POST"])  # type: ignore[untyped-decorator]
    def answers() -> str:
        return flask.request.get_data(as_text=True)

    @app.server.route(f"{prefix}gone")  # type: ignore[untyped-decorator]
    def gone() -> str:
        flask.abort(410, SECRET)

    guarding = {"allowed_hosts": (), "script_hashes": app.csp_hashes(), **guarding}
    guard(app.server, token=token, prefix=prefix, **guarding)
    return app.server


def get(server: flask.Flask, path: str, **options: Any) -> TestResponse:
    return server.test_client(use_cookies=False).get(path, **options)


def cookie_of(response: TestResponse) -> str:
    return response.headers["Set-Cookie"].partition(";")[0]


def update(value: str) -> Mapping[str, Any]:
    return {
        "output": "out.children",
        "outputs": {"id": "out", "property": "children"},
        "inputs": [{"id": "in", "property": "value", "value": value}],
        "changedPropIds": ["in.value"],
    }


# -- tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EVERYWHERE)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PROPFIND"])
def test_nothing_is_served_without_the_token(path: str, method: str) -> None:
    response = guarded().test_client().open(path, method=method)
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"].startswith("Bearer")
    assert "Set-Cookie" not in response.headers


@pytest.mark.parametrize("path", ["/", "/any/page", "/_dash-layout", "/_dash-dependencies"])
def test_the_token_in_a_header_opens_everything(path: str) -> None:
    response = get(guarded(), path, headers=BEARER)
    assert response.status_code == 200
    assert "Set-Cookie" not in response.headers


def test_a_callback_answers_with_the_token_and_in_json_without() -> None:
    client = guarded().test_client()
    refused = client.post("/_dash-update-component", json=update("x"))
    assert refused.status_code == 401
    assert set(refused.get_json()) == {"error"}
    answered = client.post("/_dash-update-component", json=update("x"), headers=BEARER)
    assert answered.get_json()["response"]["out"]["children"] == "x"


def test_a_visitor_logs_in_and_stays_in() -> None:
    client = guarded().test_client()
    page = client.get("/run/0123?tab=a%20b")
    assert page.status_code == 401
    assert 'value="/run/0123?tab=a+b"' in page.text
    assert 'action="/login"' in page.text
    assert "<script" not in page.text
    entered = client.post("/login", data={"token": TOKEN, "next": "/run/0123?tab=a+b"})
    assert (entered.status_code, entered.headers["Location"]) == (303, "/run/0123?tab=a+b")
    assert client.get("/run/0123").status_code == 200
    assert client.post("/_dash-update-component", json=update("x")).status_code == 200
    assert client.get("/login").headers["Location"] == "/"


def test_a_wrong_token_gets_the_form_again() -> None:
    client = guarded().test_client()
    page = client.post("/login", data={"token": "wrong", "next": '/a"><script>'})
    assert page.status_code == 401
    assert "That is not the token." in page.text
    assert "<script" not in page.text
    assert client.get("/").status_code == 401


def test_the_cookie_is_bound_to_the_token_and_says_nothing_of_it() -> None:
    response = get(guarded(prefix="/lab/"), "/lab/?token=" + TOKEN)
    parts = response.headers["Set-Cookie"].split("; ")
    assert {"HttpOnly", "Path=/lab/", "SameSite=Strict"} <= set(parts)
    assert "Secure" not in parts
    assert TOKEN not in parts[0]
    assert len(parts[0].partition("=")[2]) == 64
    other = guarded(token="another token of some length", prefix="/lab/")
    assert get(other, "/lab/", headers={"Cookie": parts[0]}).status_code == 401
    assert get(guarded(), "/", headers={"Cookie": parts[0]}).status_code == 200
    altered = parts[0][:-1] + ("0" if parts[0][-1] != "0" else "1")
    assert get(guarded(), "/", headers={"Cookie": altered}).status_code == 401


@pytest.mark.parametrize(
    "how",
    [{"base_url": "https://localhost"}, {"headers": {"X-Forwarded-Proto": "https"}}],
)
def test_the_cookie_of_an_encrypted_connection_stays_on_such(how: Any) -> None:
    response = get(guarded(), "/?token=" + TOKEN, **how)
    assert "Secure" in response.headers["Set-Cookie"].split("; ")


def test_the_token_leaves_the_address_at_once() -> None:
    client = guarded().test_client()
    response = client.get(f"/compare?runs=a&token={TOKEN}&runs=b%26c")
    assert response.status_code == 303
    assert response.headers["Location"] == "/compare?runs=a&runs=b%26c"
    assert client.get(response.headers["Location"]).status_code == 200
    assert get(guarded(), "/?token=wrong").status_code == 401


@pytest.mark.parametrize(
    "given",
    [
        b"",
        b"\x00",
        b"\xff\xfe",
        "日本語".encode(),
        b"x" * 60_000,
        TOKEN.encode("latin-1"),
        TOKEN.encode()[:-1],
        TOKEN.encode() + b"x",
    ],
)
def test_no_bytes_but_the_token_s_are_taken(given: bytes) -> None:
    client = guarded().test_client()
    header = {"Authorization": "Bearer " + given.decode("latin-1")}
    name = cookie_of(get(guarded(), "/?token=" + TOKEN)).partition("=")[0]
    cookie = {"Cookie": f"{name}={given.decode('latin-1')}"}
    quoted = "".join(f"%{byte:02x}" for byte in given[:5_000])
    sent = {"data": f"token={quoted}", "content_type": "application/x-www-form-urlencoded"}
    if b"\x00" not in given:
        assert get(guarded(), "/", headers=header).status_code == 401
        assert get(guarded(), "/", headers=cookie).status_code == 401
    assert client.get(f"/?token={quoted}").status_code == 401
    assert client.post("/login", **sent).status_code == 401


def test_ten_thousand_wrong_guesses_leave_nothing_behind() -> None:
    server = guarded()
    page = EnvironBuilder("/").get_environ()
    statuses: set[str] = set()

    def guess(count: int) -> None:
        for number in range(count):
            wrong = f"{number:064d}"
            given = {"HTTP_AUTHORIZATION": f"Bearer {wrong}", "QUERY_STRING": f"token={wrong}"}
            answer = Response.from_app(server, {**page, **given})
            statuses.add(answer.status)
        for number in range(count // 50):
            data = {"token": f"{number:064d}"}
            assert server.test_client().post("/login", data=data).status_code == 401

    guess(200)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    guess(10_000)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 500_000
    assert statuses == {"401 UNAUTHORIZED"}
    assert get(server, "/", headers=BEARER).status_code == 200


def test_a_short_token_is_refused() -> None:
    with pytest.raises(EntropyLensError, match="token of at least 16 characters, got 5"):
        guarded(token="short")
    with pytest.raises(EntropyLensError, match="token of at least 16 characters, got 0"):
        guarded(token="")


@pytest.mark.parametrize(
    "target",
    [
        "//evil.example",
        "/\\evil.example",
        "https://evil.example",
        "javascript:alert(1)",
        "/lab/../../evil",
        "/lab/%2e%2e/x",
        "/lab//evil.example",
        "/lab/%2f/evil.example",
        "/lab/a\r\nSet-Cookie: a=b",
        "/lab/\t/evil.example",
        "/labs",
        "/",
        "",
        "/lab/é",
    ],
)
def test_a_login_leads_only_into_the_dashboard(target: str) -> None:
    client = guarded(prefix="/lab/").test_client()
    response = client.post("/lab/login", data={"token": TOKEN, "next": target})
    assert (response.status_code, response.headers["Location"]) == (303, "/lab/")
    assert response.headers.getlist("Set-Cookie")[1:] == []


@pytest.mark.parametrize("path", ["//evil.example/", "/..//evil.example", "/%5Cevil.example"])
def test_a_token_in_an_address_leads_only_into_the_dashboard(path: str) -> None:
    response = get(guarded(), f"{path}?token={TOKEN}", base_url="http://localhost")
    location = response.headers.get("Location", "/")
    assert location.startswith(("/", "http://localhost/"))
    assert not location.startswith(("//", "/\\"))


def test_a_link_from_another_site_asks_once_more_by_itself() -> None:
    elsewhere = {"Sec-Fetch-Site": "cross-site"}
    assert 'content="0;url=/run/a"' in get(guarded(), "/run/a", headers=elsewhere).text
    here = {"Sec-Fetch-Site": "same-origin"}
    assert "http-equiv" not in get(guarded(), "/run/a", headers=here).text


# -- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:80", "127.0.0.1:8050", "[::1]:8050", "[::1]", "lab.example:1"]
)
def test_this_machine_is_served_without_a_token(host: str) -> None:
    server = guarded(token=None, allowed_hosts=("Lab.example", "port.example:81"))
    assert get(server, "/", headers={"Host": host}).status_code == 200
    assert get(server, "/", headers={"Host": "port.example:81"}).status_code == 200
    assert get(server, "/", headers={"Host": "port.example:82"}).status_code == 421


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example:8050",
        "evil.example:127.0.0.1",
        "localhost@evil.example",
        "localhost:80@evil",
        "localhost evil",
        "[::1].evil",
        "",
        "é",
        "a" * 10_000,
    ],
)
def test_any_other_name_is_turned_away(host: str) -> None:
    server = guarded(token=None)
    for path in ("/", "/_dash-layout", "/assets/x", "/boom"):
        response = get(server, path, headers={"Host": host})
        assert response.status_code == 421
        assert "--allowed-host" in response.text
        assert "evil" not in response.text


def test_without_a_token_there_is_no_login() -> None:
    client = guarded(token=None).test_client()
    assert client.post("/login", data={"token": "x"}).status_code == 405
    assert "Set-Cookie" not in client.get("/?token=x").headers


# -- headers and errors ---------------------------------------------------------------------------


def every_kind() -> dict[str, TestResponse]:
    client, stranger = guarded().test_client(), guarded().test_client()
    suites = "/_dash-component-suites"
    calls: dict[str, tuple[str, str, dict[str, Any]]] = {
        "page": ("GET", "/", {}),
        "layout": ("GET", "/_dash-layout", {}),
        "callback": ("POST", "/_dash-update-component", {"json": update("x")}),
        "callback fails": ("POST", "/_dash-update-component", {"json": update("boom")}),
        "callback unknown": ("POST", "/_dash-update-component", {"json": {"output": "x.y"}}),
        "no JSON": ("POST", "/_dash-update-component", {"data": "x"}),
        "bad JSON": (
            "POST",
            "/_dash-update-component",
            {"data": "{", "content_type": "application/json"},
        ),
        "fails": ("GET", "/boom", {}),
        "asset missing": ("GET", "/assets/../../../../etc/passwd", {}),
        "no such package": ("GET", f"{suites}/os/path.py", {}),
        "no such file": ("GET", f"{suites}/dash/../../x.py", {}),
        "gone": ("GET", "/gone", {}),
        "method": ("DELETE", "/", {}),
        "made-up method": ("BREW", "/answers", {}),
        "too large": ("POST", "/answers", {"data": b"x" * (2 * 2**20 + 1)}),
        "login too large": ("POST", "/login", {"data": {"token": "x" * 2**16}}),
        "redirect": ("GET", f"/?token={TOKEN}", {}),
        "options": ("OPTIONS", "/", {}),
        "head": ("HEAD", "/", {}),
    }
    found = {
        name: client.open(path, method=method, headers=BEARER, **options)
        for name, (method, path, options) in calls.items()
    }
    elsewhere = get(guarded(token=None), "/", headers={"Host": "evil.example"})
    return found | {"refused": stranger.get("/"), "misdirected": elsewhere}


def test_every_kind_of_answer_carries_the_headers_and_no_secret() -> None:
    found = every_kind()
    statuses = {name: response.status_code for name, response in found.items()}
    assert statuses == {
        "page": 200, "layout": 200, "callback": 200, "callback fails": 500,
        "callback unknown": 500, "no JSON": 415, "bad JSON": 400, "fails": 500,
        "asset missing": 404, "no such package": 404, "no such file": 404, "gone": 410,
        "method": 405, "made-up method": 405, "too large": 413, "login too large": 413,
        "redirect": 303, "options": 200, "head": 200, "refused": 401, "misdirected": 421,
    }  # fmt: skip
    for name, response in found.items():
        headers = response.headers
        policy = dict(rule.split(" ", 1) for rule in headers["Content-Security-Policy"].split("; "))
        assert policy["default-src"] == "'none'", name
        assert policy["script-src"].startswith("'self' 'sha256-"), name
        assert "unsafe" not in policy["script-src"], name
        assert (policy["frame-ancestors"], policy["base-uri"]) == ("'self'", "'none'"), name
        assert headers["X-Content-Type-Options"] == "nosniff", name
        assert headers["Referrer-Policy"] == "no-referrer", name
        assert headers["Cross-Origin-Opener-Policy"] == "same-origin", name
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin", name
        assert "camera=()" in headers["Permissions-Policy"], name
        assert headers["Cache-Control"] == "no-store", name
        if response.status_code >= 400:
            for leak in ("Traceback", SECRET, "site-packages", "Werkzeug", "3.1", "dash."):
                assert leak not in response.text, name


def test_what_failed_is_in_the_server_s_log(caplog: pytest.LogCaptureFixture) -> None:
    assert get(guarded(), "/boom", headers=BEARER).status_code == 500
    assert "'GET' '/boom' failed" in caplog.text
    assert SECRET in caplog.text


def test_errors_are_json_for_a_program_and_a_page_for_a_person() -> None:
    server = guarded()
    page = get(server, "/boom", headers=BEARER)
    assert page.mimetype == "text/html"
    assert "the server&#x27;s log says why" in page.text
    program = get(server, "/boom", headers={**BEARER, "Accept": "application/json"})
    assert program.json == {"error": "It did not work; the server's log says why."}
    assert get(server, "/", headers={"Accept": "application/json"}).is_json
    method = server.test_client().delete("/_dash-layout", headers=BEARER)
    assert "GET" in method.headers["Allow"]


def test_code_may_be_kept_and_data_may_not() -> None:
    server = guarded()
    page = get(server, "/", headers=BEARER).text
    start = page.index("/_dash-component-suites/dash/dcc/dash_core_components.v")
    versioned = page[start : page.index('"', start)]
    kept = get(server, versioned, headers=BEARER).headers["Cache-Control"]
    assert kept == "private, max-age=31536000, immutable"
    chunk = "/_dash-component-suites/dash/dcc/async-graph.js"
    asked = get(server, chunk, headers=BEARER)
    assert asked.headers["Cache-Control"] == "no-cache"
    again = get(server, chunk, headers={**BEARER, "If-None-Match": asked.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")


def test_frames_are_allowed_by_name_only() -> None:
    server = guarded(frame_ancestors=("'self'", "http://localhost:*"))
    policy = get(server, "/").headers["Content-Security-Policy"]
    assert "frame-ancestors 'self' http://localhost:*;" in policy


def test_no_more_than_two_megabytes_are_read() -> None:
    client = guarded().test_client()
    assert client.post("/answers", data=b"x" * (2 * 2**20), headers=BEARER).status_code == 200
    unsized = {"wsgi.input": Endless(), "wsgi.input_terminated": True, "CONTENT_LENGTH": ""}
    answer = client.post("/answers", headers=BEARER, environ_overrides=unsized)
    assert len(answer.data) <= 2 * 2**20


class Endless:
    def read(self, size: int = -1) -> bytes:
        assert size >= 0
        return b"x" * size

    def readinto(self, buffer: Any) -> int:
        buffer[:] = b"x" * len(buffer)
        return len(buffer)


# -- prefixes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["", "/", "//", "///"])
def test_no_prefix_is_the_root(given: str) -> None:
    assert checked_prefix(given) == "/"


@pytest.mark.parametrize("given", ["lab/runs", "/lab/runs", "lab/runs/", "/lab/runs/"])
def test_a_prefix_has_a_slash_at_both_ends(given: str) -> None:
    assert checked_prefix(given) == "/lab/runs/"


@pytest.mark.parametrize(
    "given", ["../x", "/a/../b", "a//b", "a b", "<script>", "a%2fb", "é", "a?b"]
)
def test_a_prefix_that_is_no_plain_path_is_refused(given: str) -> None:
    with pytest.raises(EntropyLensError, match="expected a URL prefix such as /lab/"):
        checked_prefix(given)


def test_under_a_prefix_the_rest_of_the_server_is_closed_too() -> None:
    client = guarded(prefix="/lab/").test_client()
    assert client.get("/").status_code == 401
    assert client.get("/login").status_code == 401
    assert client.post("/login", data={"token": TOKEN}).status_code == 401
    assert 'action="/lab/login"' in client.get("/lab/x").text
    assert client.get("/", headers=BEARER).status_code == 404
