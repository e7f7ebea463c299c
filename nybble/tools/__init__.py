"""Tools in prompts and replies: what a model is told of them, and which it calls. No torch."""

from nybble.tools.base import (
    CallDelta,
    CallEnd,
    Delta,
    Layout,
    Reply,
    TextDelta,
    Tool,
    ToolCall,
    ToolFormat,
    ToolParser,
    ToolPrompt,
    json_arguments,
)
from nybble.tools.hermes import HermesFormat
from nybble.tools.react import ReActFormat

__all__ = [
    "CallDelta",
    "CallEnd",
    "Delta",
    "HermesFormat",
    "Layout",
    "ReActFormat",
    "Reply",
    "TextDelta",
    "Tool",
    "ToolCall",
    "ToolFormat",
    "ToolParser",
    "ToolPrompt",
    "json_arguments",
]
