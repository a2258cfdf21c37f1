import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from entropylens import dictionary
from entropylens.dictionary import definition, definitions
from entropylens.errors import EntropyLensError


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "dictionary.json"
    monkeypatch.setattr(dictionary, "_FILE", path)
    definitions.cache_clear()
    yield path
    definitions.cache_clear()


def entry(unit: str) -> dict[str, str]:
    fields = dictionary.Definition.__dataclass_fields__
    return {field: unit for field in fields if field != "name"}


def test_every_stored_definition_is_complete() -> None:
    for name, found in definitions().items():
        assert found.name == name
        assert all(vars(found).values()), name


def test_a_plain_name_is_found_as_it_is() -> None:
    found = definition("entropy/token/mean")
    assert (found.unit, found.diagnostic) == ("nats", "token_entropy")


def test_a_name_may_match_a_pattern() -> None:
    assert definition("user/reward/mean").name == "user/*"
    assert definition("entropy/position/16/mean").name == "entropy/position/*/mean"


def test_the_exact_name_counts_before_patterns_and_the_longest_pattern_before_others(
    written: Path,
) -> None:
    names = {"a/*": "wide", "a/b/*": "narrow", "a/b/c": "exact"}
    metrics = {name: entry(unit) for name, unit in names.items()}
    written.write_text(json.dumps({"metrics": metrics}))
    assert [definition(n).unit for n in ("a/x", "a/b/x", "a/b/c")] == ["wide", "narrow", "exact"]


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(
        EntropyLensError, match=r"explain: expected a metric .* did you mean 'entropy/token/mean'"
    ):
        definition("entropy/tokens/mean")


@pytest.mark.parametrize("content", [None, "{", "{}", '{"metrics": {"a": {"unit": "1"}}}', "[]"])
def test_a_dictionary_that_is_missing_or_damaged_is_said_to_be(
    written: Path, content: str | None
) -> None:
    if content is not None:
        written.write_text(content)
    with pytest.raises(
        EntropyLensError, match=r"expected the metric dictionary .* `make dictionary`"
    ):
        definitions()
