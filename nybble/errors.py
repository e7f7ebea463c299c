"""Errors that a user can cause and repair. Every message ends in what to do next."""


class NybbleError(Exception):
    """Base of every error that nybble raises on purpose; the CLI prints it without a traceback."""


class ConfigError(NybbleError):
    """A setting, a JSON file or a command line asks for something that nybble does not do."""


class CheckpointError(NybbleError):
    """A model folder is incomplete, damaged or of a kind that nybble does not read."""


class RequestError(NybbleError, ValueError):
    """One request cannot run: bad sampling values, an empty prompt, text where ids are needed.

    param: the setting that is to blame, where it is one.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class CapacityError(NybbleError):
    """The request or model does not fit: context length, memory, disk."""


class NumericsError(NybbleError):
    """A NaN or Inf appeared while computing; the message names the layer where it began."""


class BusyError(NybbleError):
    """Too many requests are waiting already: the same one may be sent again later."""


class UnavailableError(NybbleError):
    """The engine is not there for requests: it is shutting down, or a step of it failed."""
