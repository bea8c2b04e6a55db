"""Form of `knorm page`: the JSON beside the page."""

from __future__ import annotations

from knorm.cli.schemas.parts import Result
from knorm.page.form import Page


class Paged(Page, Result):
    """Hold every verdict and number of a page that `knorm page` made."""
