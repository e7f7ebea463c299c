"""What every request body has in common."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

T = TypeVar("T")
# A list that is refused with its first bad element. Pydantic would make an error of every one,
# and of a body full of them seconds of work.
Many = Annotated[list[T], Field(fail_fast=True)]


class Body(BaseModel):
    """Strict: no text is read as a number, and no field is ignored: the first unknown one is what
    the whole body is refused for."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = {key: value for key, value in data.items() if value is not None}
        unknown = [key for key in given if key not in _fields(cls)]
        for key in unknown[1:]:
            del given[key]
        return given


@cache
def _fields(body: type[Body]) -> frozenset[str]:
    return frozenset(field.alias or name for name, field in body.model_fields.items())
