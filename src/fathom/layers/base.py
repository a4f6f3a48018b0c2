"""What every config class is: a frozen dataclass whose bounds are checked before a tensor is made.

Plain dataclasses, so that ``torch.compile`` sees plain attributes; pydantic's ``TypeAdapter`` reads
them at the border (``fathom.config``), where ``extra = "forbid"`` makes an unknown key an error.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Union

from pydantic import Discriminator, GetCoreSchemaHandler
from pydantic_core import CoreSchema


class Config:
    """Base of every config dataclass. A subclass is ``@dataclass(frozen=True, kw_only=True)``."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid", "strict": True}


@dataclass(frozen=True)
class OneOf:
    """Marks a field whose class ``kind`` picks from a table, read each time a schema is built.

    So a class that a user registers is known from then on: ``Annotated[Base, OneOf(TABLE)]``.
    """

    table: Mapping[str, type]

    def __get_pydantic_core_schema__(
        self, source: type, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        classes = tuple(self.table.values())
        if len(classes) == 1:
            return handler.generate_schema(classes[0])
        union = Annotated[Union[classes], Discriminator("kind")]  # noqa: UP007  a table of classes
        return handler.generate_schema(union)


def require(ok: bool, message: str) -> None:
    """Raise ``ValueError(message)`` unless ``ok``: the one way a config refuses a value.

    The message names the field, what it got, why that cannot be, and what is allowed.
    """
    if not ok:
        raise ValueError(message)


def require_positive(config: Config, *fields: str) -> None:
    """Refuse a count that is not at least 1; ``None`` (an absent option) passes."""
    for field in fields:
        value = getattr(config, field)
        require(value is None or value >= 1, f"{field} must be at least 1, got {value}")
