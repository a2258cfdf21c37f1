"""The Dash app over a folder of runs: `entropylens dashboard runs/`.

`create_server` is what a WSGI server runs, `show` what a notebook shows. Importing this package
loads neither Dash nor the pages.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from entropylens_dashboard.serving import create_server, serve, show

__all__ = ["create_server", "serve", "show"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from entropylens_dashboard import serving

    return getattr(serving, name)
