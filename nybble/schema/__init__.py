"""Which JSON schemas can be enforced while an answer is written. Pure Python."""

from nybble.schema.check import FORMATS, MAX_DEPTH, MAX_LIMITS, MAX_SUBSCHEMAS, Budget, check_schema

__all__ = ["FORMATS", "MAX_DEPTH", "MAX_LIMITS", "MAX_SUBSCHEMAS", "Budget", "check_schema"]
