"""Files of a model: safetensors read and written, GGUF imported, hubs asked."""

from nybble.checkpoint.files import read_json
from nybble.checkpoint.gguf import import_gguf
from nybble.checkpoint.header import TensorInfo
from nybble.checkpoint.reader import Checkpoint
from nybble.checkpoint.writer import CheckpointWriter

__all__ = ["Checkpoint", "CheckpointWriter", "TensorInfo", "import_gguf", "read_json"]
