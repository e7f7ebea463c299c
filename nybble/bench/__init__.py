"""Measurements as commands: never part of a test, always beside the floor of the machine."""
