"""One way to fill in the pages' templates."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from layerprune.report import words

if TYPE_CHECKING:
    from jinja2 import Environment


def environment(filters: Iterable[str], *, autoescape: bool) -> Environment:
    """Return jinja over this package's templates; what a template names must exist. ``filters``: names in ``words``."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.PackageLoader("layerprune.report", "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=autoescape,
    )
    made.filters |= {name: getattr(words, name) for name in filters}
    return made
