"""How failures reach the user: one clear line on stderr and an exit code, no traceback."""

from __future__ import annotations

import errno
import sys
from types import TracebackType
from typing import Any

import typer
from typer.core import TyperGroup

from nybble.cli import console
from nybble.errors import NybbleError

FAILED, INTERRUPTED = 1, 130


class CommandGroup(TyperGroup):
    """The commands of nybble. Usage errors exit 2, as typer makes them; `--debug` hides nothing."""

    def invoke(self, ctx: Any) -> Any:
        # ctx is click's Context, which newer releases of typer carry inside themselves.
        try:
            result = super().invoke(ctx)
            # A reader that went away is noticed here, not while Python shuts down.
            sys.stdout.flush()
        except NybbleError as error:
            if ctx.params.get("debug"):
                raise
            console.error(str(error))
            raise typer.Exit(FAILED) from error
        except OSError as error:
            # A reader that went away is no error: it is left to those who know what to do.
            if error.errno == errno.EPIPE or ctx.params.get("debug"):
                raise
            console.error(_of_files(error))
            raise typer.Exit(FAILED) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(INTERRUPTED) from error
        return result


def _of_files(error: OSError) -> str:
    """What the system would not do, and with which file."""
    what = error.strerror or str(error)
    where = f"{what}: {error.filename}" if error.filename else what
    return f"{where}. Check that the path is right, that it may be used, and that there is room."


def report_bug(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """What takes the place of sys.excepthook: an error that nybble did not foresee."""
    console.error(
        f"{kind.__name__}: {error}. This is a bug in nybble: run the command again as "
        "`nybble --debug ...` and report what it prints."
    )
