"""The real server in a process of its own, which writes down what each answer took."""

import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from entropylens_dashboard import serving

REPOSITORY = Path(__file__).resolve().parents[2]


class Timed:
    """A WSGI application whose answers are timed: from the whole request to the whole answer."""

    def __init__(self, application: Any, log: Path) -> None:
        self._application = application
        self._log = open(log, "a", buffering=1)  # noqa: SIM115 until the process ends

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        asked = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(asked)
        seen: dict[str, Any] = {}

        def start(status: str, headers: list[tuple[str, str]], *more: Any) -> Any:
            seen.update(status=status, encoding=dict(headers).get("Content-Encoding"))
            return start_response(status, headers, *more)

        at, began, cpu = time.time(), time.perf_counter(), time.thread_time()
        answered: Iterable[bytes] = self._application(environ, start)
        body = b"".join(answered)
        facts = {
            "at": at,
            "ms": 1e3 * (time.perf_counter() - began),
            "cpu_ms": 1e3 * (time.thread_time() - cpu),
            "path": environ["PATH_INFO"],
            "asked": len(asked),
            "sent": len(body),
            **seen,
            **_callback(asked),
        }
        self._log.write(json.dumps(facts) + "\n")
        return [body]


def _callback(asked: bytes) -> dict[str, Any]:
    try:
        found = json.loads(asked)
        inputs = [one for one in found["inputs"] if isinstance(one, dict)]
    except (ValueError, KeyError, TypeError):
        return {}
    beats = [one.get("value") for one in inputs if one.get("id") == "beat"]
    changed = ",".join(found.get("changedPropIds", []))
    return {"output": found["output"][:60], "changed": changed, "beat": (beats or [None])[0]}


class Server:
    """A dashboard that has just been started, until it is closed."""

    def __init__(self, folder: Path, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")
        self._log, began = log, time.perf_counter()
        module = "benchmarks.dashboard_parts.server"
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, str(folder), str(log)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()
        self.start_s = time.perf_counter() - began
        if not self.url:
            raise RuntimeError(f"the server ended with {self._process.wait()}")

    @property
    def pid(self) -> int:
        return self._process.pid

    def answers(self, after: int = 0) -> list[dict[str, Any]]:
        """What was answered, without the first so many."""
        return [json.loads(line) for line in self._log.read_text().splitlines()[after:]]

    def memory(self, what: str = "VmRSS") -> float:
        """MiB now, or with VmHWM the most that it was."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(what):
                return round(int(line.split()[1]) / 1024, 1)
        return float("nan")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def main(folder: str, log: str) -> None:
    listener = serving._listen("127.0.0.1", 0)
    server = serving.create_server(folder)
    server.wsgi_app = Timed(server.wsgi_app, Path(log))  # type: ignore[method-assign]
    wsgi = serving._wsgi(server, listener)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}/", flush=True)
    wsgi.run()


if __name__ == "__main__":
    main(*sys.argv[1:3])
