"""Triton runs in its interpreter here, which must be asked for before it is first imported."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
