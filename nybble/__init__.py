"""nybble: runs Qwen chat models in four bits."""
