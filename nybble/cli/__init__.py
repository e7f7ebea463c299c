"""The command `nybble`. Nothing heavy is imported before a command needs it."""

from nybble.cli.app import main

__all__ = ["main"]
