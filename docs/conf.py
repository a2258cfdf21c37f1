import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
for folder in (ROOT, ROOT / "callbacks", ROOT / "dashboard"):
    sys.path.insert(0, str(folder))

import entropylens  # noqa: E402

project = "entropylens"
author = "the entropylens authors"
release = version = entropylens.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser"]
exclude_patterns = ["_build", "decisions/README.md"]
html_theme = "furo"
html_title = "entropylens"
default_role = "any"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
napoleon_custom_sections = ["Shape", "Unit", "Device", "Cost", "Source"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["ref.any", "ref.python", "myst.header"]


def write_metrics() -> None:
    """One section for each metric of the dictionary."""
    metrics = json.loads((ROOT / "entropylens" / "dictionary.json").read_text())["metrics"]
    lines = [
        "# What each metric means",
        "",
        "Generated from the registered diagnostics. `entropylens explain NAME` prints the same.",
        "",
    ]
    for name, metric in metrics.items():
        lines += [f"## `{name}`", "", f"**{metric['question']}**", ""]
        for field in ("formula", "unit", "estimator", "ranks", "high", "low", "cost", "source"):
            lines.append(f"- *{field}*: {metric[field].replace('*', chr(92) + '*')}")
        lines += [f"- *diagnostic*: `{metric['diagnostic']}`", ""]
    (ROOT / "docs" / "metrics.md").write_text("\n".join(lines))


write_metrics()
