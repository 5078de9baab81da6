"""Cursor pagination: pages start after an id, so rows created in the meantime do not shift them."""

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Generic, Literal, Self, TypeVar

from fastapi import Query
from pydantic import BaseModel, ConfigDict, Field

from tpo.wire import Identified, Wire

Row = TypeVar("Row")
Item = TypeVar("Item", bound=Identified)
Model = TypeVar("Model", bound=BaseModel)


PAGE_BYTES = 1024 * 1024
"""Largest JSON of the items of a page, unless its first item alone is larger."""


def fitting(items: Iterable[Model]) -> list[Model]:
    """Return the first items, as many as fit into a page, but one at least. No further item is made."""
    page: list[Model] = []
    size = 0
    for item in items:
        size += len(item.model_dump_json().encode())
        if page and size > PAGE_BYTES:
            break
        page.append(item)
    return page


class Page(Wire, Generic[Item]):
    """A page of a list. Request the next page with `after` set to `last_id`."""

    object: Literal["list"] = "list"
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool

    @classmethod
    def of(cls, rows: Sequence[Row], limit: int, view: Callable[[Row], Item]) -> Self:
        """Build a page from up to `limit + 1` rows, of as many as fit; a further row shows that there are more."""
        data = fitting(map(view, rows[:limit]))
        return cls(
            data=data,
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
            has_more=len(rows) > len(data),
        )


class PageOptions(BaseModel):
    """Size and start of a page."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    limit: int = Field(20, ge=1, le=100)
    after: str | None = Field(None, pattern=r"^[!-~]{1,64}$", description="`last_id` of the previous page")


PageQuery = Annotated[PageOptions, Query()]
