"""What a browser keeps of a page of the dashboard, and asks its server with it."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import flask

__all__ = ["Answer", "Callback", "Send", "Visit", "callbacks", "parts", "through"]


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace")

    def outputs(self) -> dict[str, Any]:
        """By component and property; empty where nothing changed."""
        found: dict[str, Any] = json.loads(self.body)["response"] if self.status == 200 else {}
        return found


Send = Callable[[str, bytes | None], Answer]
"""Asks for a path, by GET, or by POST where there is JSON to send."""


def through(server: flask.Flask) -> Send:
    """Straight into the app, without a socket."""
    client = server.test_client()

    def send(path: str, body: bytes | None = None) -> Answer:
        if body is None:
            found = client.get(path)
        else:
            found = client.post(path, data=body, content_type="application/json")
        return Answer(found.status_code, found.data, dict(found.headers))

    return send


@dataclass(frozen=True)
class Callback:
    """One that the server answers."""

    output: str
    inputs: tuple[tuple[Any, str], ...]
    state: tuple[tuple[Any, str], ...]

    @property
    def name(self) -> str:
        """Its outputs without the digests that Dash adds."""
        return " ".join(part.partition("@")[0] for part in self._outputs())

    @property
    def arguments(self) -> tuple[tuple[Any, str], ...]:
        return self.inputs + self.state

    def _outputs(self) -> list[str]:
        return self.output.strip(".").split("...")

    def body(self, values: Callable[[Any, str], Any], graphs: Sequence[Any] = ()) -> dict[str, Any]:
        """What the browser sends; ``values`` gives what stands in a component's property."""
        outputs: list[Any] = []
        for part in self._outputs():
            id, _, prop = part.rpartition(".")
            if "ALL" in id:
                outputs.append([{"id": {"graph": graph}, "property": prop} for graph in graphs])
            else:
                outputs.append({"id": _id(id), "property": prop})
        sent = [
            [{"id": id, "property": prop, "value": values(id, prop)} for id, prop in places]
            for places in (self.inputs, self.state)
        ]
        first, prop = self.inputs[0]
        named = first if isinstance(first, str) else json.dumps(first, separators=(",", ":"))
        return {
            "output": self.output,
            "outputs": outputs if self.output.startswith("..") else outputs[0],
            "inputs": sent[0],
            "state": sent[1],
            "changedPropIds": [f"{named}.{prop}"],
        }


def callbacks(send: Send) -> dict[str, Callback]:
    """Those that the server answers, by what they put out."""
    found = json.loads(send("/_dash-dependencies", None).body)
    known = [
        Callback(
            one["output"],
            tuple((_id(place["id"]), place["property"]) for place in one["inputs"]),
            tuple((_id(place["id"]), place["property"]) for place in one["state"]),
        )
        for one in found
        if one["clientside_function"] is None
    ]
    return {callback.name: callback for callback in known}


def _id(text: str) -> Any:
    return json.loads(text) if text.startswith("{") else text


def parts(tree: Any) -> Iterator[dict[str, Any]]:
    """The properties of all components of a layout."""
    if isinstance(tree, list):
        for one in tree:
            yield from parts(one)
    elif isinstance(tree, dict):
        if "props" in tree:
            yield tree["props"]
        for one in tree.values():
            yield from parts(one)


class Visit:
    """A page that was opened: its stores, as a browser keeps them.

    Args:
        send: To the server.
        known: Its callbacks.
    """

    def __init__(self, send: Send, known: Mapping[str, Callback]) -> None:
        self.send, self.known = send, known
        self.values: dict[str, Any] = {}
        self.graphs: list[str] = []
        self.figures: dict[str, Any] = {}

    def value(self, id: Any, prop: str) -> Any:
        return self.values.get(_place(id, prop))

    def ask(self, name: str, **changed: Any) -> Answer:
        """Have a callback answered; ``changed`` is by ``id__property``."""
        for place, value in changed.items():
            self.values[place.replace("__", ".").replace("_", "-")] = value
        body = self.known[name].body(self.value, self.graphs)
        return self.send("/_dash-update-component", json.dumps(body).encode())

    def open(self, path: str) -> Answer:
        """Go to an address."""
        place, _, query = path.partition("?")
        self.values = {"url.pathname": place, "url.search": f"?{query}" if query else ""}
        answer = self.ask("page.children")
        for props in parts(answer.outputs()):
            if "id" in props:
                for prop in set(props) - {"id", "children"}:
                    self.values[_place(props["id"], prop)] = props[prop]
        return answer

    def draw(self, **changed: Any) -> Answer:
        """Have the figures drawn."""
        answer = self.ask("panels.children ledger.data", **changed)
        found = answer.outputs()
        if "ledger" in found:
            self.values["ledger.data"] = found["ledger"]["data"]
        if "panels" in found:
            shown = list(parts(found["panels"]))
            self.figures = {p["id"]["graph"]: p["figure"] for p in shown if "figure" in p}
            self.graphs = list(self.figures)
        return answer

    def beat(self) -> Answer:
        """What every two seconds brings; new figures are asked for where the server says so."""
        self.values["beat.data"] = (self.values.get("beat.data") or 0) + 1
        answer = self.ask('{"graph":["ALL"]}.figure ledger.data again.data answered.data')
        found = answer.outputs()
        if "ledger" in found:
            self.values["ledger.data"] = found["ledger"]["data"]
        if "again" in found:
            self.values["again.data"] = found["again"]["data"]
        return answer


def _place(id: Any, prop: str) -> str:
    return f"{id if isinstance(id, str) else json.dumps(id, sort_keys=True)}.{prop}"
