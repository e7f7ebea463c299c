"""The true command line around a slow fake model, to be run on a terminal of its own."""

import os
import sys

from fake_llm import FakeLLM

import nybble.cli.chat
from nybble.cli import main

if sys.stdin and sys.stdin.isatty():
    # A session leader that opens a terminal is the one whom its Ctrl-C reaches.
    os.close(os.open(os.ttyname(0), os.O_RDWR))
nybble.cli.chat.load = lambda *_: FakeLLM(delay=0.05)
main()
