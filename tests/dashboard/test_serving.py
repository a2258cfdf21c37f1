import base64
import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
from dash import Dash, Input, Output, dcc, html, page_container

from entropylens.errors import EntropyLensError
from entropylens.store.writer import RunWriter
from entropylens_dashboard import serving
from entropylens_dashboard.serving import create_server, serve, show

TOKEN = "a token that is long enough"


def tiny(folder: str | Path, *, prefix: str = "/") -> Dash:
    """In the place of the real app: one inline script, and pages, which add another late."""
    if not Path(folder).is_dir():
        raise EntropyLensError("create_app: expected a folder")
    app = Dash("tiny", url_base_pathname=prefix, add_log_handler=False, use_pages=True,
               pages_folder="")  # fmt: skip
    app.layout = html.Div([dcc.Input(id="in"), html.Div(id="out"), page_container])
    app.clientside_callback("value => value", Output("out", "children"), Input("in", "value"))
    return app


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("entropylens_dashboard.app.create_app", tiny)
    monkeypatch.delenv("ENTROPYLENS_TOKEN", raising=False)
    yield
    serving._shown.clear()


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `serve` says; it then answers no request and returns."""
    said: list[str] = []

    class Nobody:
        def run(self) -> None:
            pass

    monkeypatch.setattr(serving, "_say", said.extend)
    monkeypatch.setattr(serving, "_wsgi", lambda server, listener: Nobody())
    return said


def fetch(url: str, **headers: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        with error:
            return error.code, error.read().decode()


# -- as a WSGI application ------------------------------------------------------------------------


def test_the_application_is_guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = create_server(tmp_path).test_client()
    assert client.get("/").status_code == 200
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 421
    named = create_server(tmp_path, allowed_hosts=("lab.example",)).test_client()
    assert named.get("/", headers={"Host": "lab.example"}).status_code == 200
    assert create_server(tmp_path, token=TOKEN).test_client().get("/").status_code == 401
    monkeypatch.setenv("ENTROPYLENS_TOKEN", TOKEN)
    assert create_server(tmp_path).test_client().get("/").status_code == 401
    monkeypatch.setenv("ENTROPYLENS_TOKEN", "")
    assert create_server(tmp_path).test_client().get("/").status_code == 200


def test_it_lives_under_its_prefix(tmp_path: Path) -> None:
    client = create_server(tmp_path, prefix="lab/runs").test_client()
    assert client.get("/lab/runs/").status_code == 200
    assert client.get("/").status_code == 404


def test_every_inline_script_of_a_page_may_run_and_no_other(tmp_path: Path) -> None:
    answer = create_server(tmp_path).test_client().get("/")
    policy = answer.headers["Content-Security-Policy"]
    page = re.sub(r"<!--.*?-->", "", answer.text, flags=re.S)
    found = re.findall(r"<script([^>]*)>(.*?)</script>", page, re.S)
    scripts = [text for kind, text in found if text and "application/json" not in kind]
    assert len(scripts) == 3  # the page's, the title's, the renderer's
    assert policy.count("sha256-") == 3
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_what_cannot_be_served_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EntropyLensError, match="expected a folder"):
        create_server(tmp_path / "nowhere")
    with pytest.raises(EntropyLensError, match="token of at least 16 characters, got 5"):
        create_server(tmp_path, token="short")
    with pytest.raises(EntropyLensError, match="expected a URL prefix"):
        create_server(tmp_path, prefix="../x")
    monkeypatch.setenv("ENTROPYLENS_TOKEN", "short")
    with pytest.raises(EntropyLensError, match="token of at least 16 characters, got 5"):
        serve(tmp_path)


# -- as a program ---------------------------------------------------------------------------------


def test_on_this_machine_no_token_is_needed(tmp_path: Path, printed: list[str]) -> None:
    RunWriter(tmp_path / "run", flush_seconds=0.01).close()
    serve(tmp_path, port=0, prefix="lab")
    text = "\n".join(printed)
    assert f"folder  {tmp_path} (1 run)" in text
    port = re.search(r"open    http://127\.0\.0\.1:(\d+)/lab/\n", text)
    assert port is not None
    assert f"ssh -L {port[1]}:127.0.0.1:{port[1]} {socket.gethostname()}" in text
    assert "stop    Ctrl-C" in text
    assert "?token=" not in text


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_on_any_other_address_a_token_is_made(
    tmp_path: Path, printed: list[str], host: str
) -> None:
    serve(tmp_path, host=host, port=0)
    serve(tmp_path, host=host, port=0)
    tokens = re.findall(r"\?token=([\w-]{43})$", "\n".join(printed), re.M)
    assert len(set(tokens)) == 2
    assert "\n".join(printed).count(tokens[0]) == 1
    assert f"http://{socket.gethostname()}:" in printed[1]
    assert "ssh" not in "\n".join(printed)


def test_a_token_that_was_given_is_not_printed(
    tmp_path: Path, printed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(tmp_path, host="0.0.0.0", port=0, token=TOKEN)
    monkeypatch.setenv("ENTROPYLENS_TOKEN", TOKEN)
    serve(tmp_path, port=0)
    assert printed.count("token   as given") == 2
    assert "token=" not in "\n".join(printed)
    assert TOKEN not in "\n".join(printed)


def test_a_browser_is_opened_without_the_token(
    tmp_path: Path, printed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    serve(tmp_path, port=0)
    assert opened == []
    serve(tmp_path, host="0.0.0.0", port=0, open_browser=True)
    assert len(opened) == 1
    assert "token" not in opened[0]


def test_a_taken_port_is_passed_over(tmp_path: Path, printed: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        serve(tmp_path, port=port)
        text = "\n".join(printed)
        found = re.search(r"http://127\.0\.0\.1:(\d+)/", text)
        assert found is not None
        assert port < int(found[1]) < port + serving.PORTS
        assert f"port    {port} was taken" in text


def test_without_a_free_port_it_says_so(
    tmp_path: Path, printed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "PORTS", 1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EntropyLensError, match=f"expected a free port from {port} to {port}"):
            serve(tmp_path, port=port)
    with pytest.raises(ValueError, match="expected a port from 0 to 65535, got 65536"):
        serve(tmp_path, port=65_536)
    with pytest.raises(EntropyLensError, match="expected an address of this machine"):
        serve(tmp_path, host="192.0.2.1")
    assert printed == []


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("", False),
        ("10.0.0.1", False),
        ("localhost.example", False),
    ],
)
def test_loopback_addresses_are_known(host: str, is_loopback: bool) -> None:
    assert serving._is_loopback(host) is is_loopback


def test_the_program_answers_until_it_is_stopped(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "entropylens.cli", "dashboard", str(tmp_path)]
    command += ["--host", "127.0.0.1", "--port", "0", "--token", TOKEN]
    source = Path(serving.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{source}:{source.parent}"}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        lines = [process.stdout.readline() for _ in range(5)]
        url = lines[1].split()[1]
        assert fetch(url)[0] == 401
        status, page = fetch(url, Authorization=f"Bearer {TOKEN}")
        assert (status, "_dash-config" in page) == (200, True)
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(20) == 0
        finally:
            process.kill()
        assert process.stderr.read() == ""


def test_waitress_does_not_name_itself_and_marks_cookies_of_a_proxy(tmp_path: Path) -> None:
    server = create_server(tmp_path, token=TOKEN)
    with serving._listen("127.0.0.1", 0) as listener:
        wsgi = serving._wsgi(server, listener)
        threading.Thread(target=wsgi.run, daemon=True).start()
        with socket.create_connection(listener.getsockname()) as client:
            token = TOKEN.replace(" ", "%20")
            client.sendall(
                f"GET /?token={token} HTTP/1.1\r\nHost: a\r\nX-Forwarded-Proto: https\r\n"
                f"Connection: close\r\n\r\n".encode()
            )
            answer = b"".join(iter(lambda: client.recv(65_536), b"")).decode()
        wsgi.close()
    assert answer.startswith("HTTP/1.1 303")
    assert "\r\nServer:" not in answer
    assert "; Secure;" in answer


# -- in a notebook --------------------------------------------------------------------------------


def test_a_notebook_shows_one_server_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENTROPYLENS_TOKEN", TOKEN)  # a frame could not keep its cookie
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    frame, same, other = show("."), show(tmp_path, height=300), show(tmp_path / "other")
    assert frame.url == same.url != other.url
    assert re.fullmatch(r"http://localhost:\d+/", frame.url)
    assert fetch(frame.url)[0] == 200
    assert fetch(frame.url, Host="evil.example")[0] == 421
    with urllib.request.urlopen(frame.url) as answer:
        policy = answer.headers["Content-Security-Policy"]
    assert "frame-ancestors 'self' http://localhost:* http://127.0.0.1:*" in policy
    assert f'<iframe src="{frame.url}"' in frame._repr_html_()
    assert 'height="300"' in same._repr_html_()
    with pytest.raises(EntropyLensError, match="expected a folder"):
        show(tmp_path / "nowhere")


def test_a_frame_is_escaped() -> None:
    hostile: Any = serving.Frame('http://x/"><script>', 1)
    assert "<script" not in hostile._repr_html_()


# -- under gunicorn -------------------------------------------------------------------------------


def test_gunicorn_runs_it_in_several_processes(tmp_path: Path) -> None:
    source = Path(serving.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{source}:{source.parent}"}
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    call = f"entropylens_dashboard:create_server({str(tmp_path)!r})"
    command = [sys.executable, "-m", "gunicorn", "-w", "2", "-b", f"127.0.0.1:{port}", call]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "Booting worker" in line:
                break
        assert fetch(f"http://127.0.0.1:{port}/")[0] == 200
        assert fetch(f"http://127.0.0.1:{port}/", Host="evil.example")[0] == 421
        process.terminate()
        assert process.wait(20) == 0
