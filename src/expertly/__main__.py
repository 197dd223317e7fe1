"""The command line's only door: run a verb, turn every error into one line and an exit code."""

import atexit
import os
import signal
import sys
import tempfile
import traceback
from contextlib import suppress
from types import FrameType
from typing import TextIO

from expertly.errors import ExpertlyError, Stopped
from expertly.memory import is_out_of_memory, memory_error

DEBUG = "--debug"  # taken out before typer sees it, so that every verb has it


def main() -> None:
    """Run `expertly ARGS` and exit with the code of the error contract (docs/errors.md)."""
    arguments = [argument for argument in sys.argv[1:] if argument != DEBUG]
    try:
        signal.signal(signal.SIGTERM, _terminate)  # a verb that can save first sets its own
        code = _run(arguments)
        sys.stdout.flush()  # a reader that left is noticed here, not in the interpreter's exit
    except KeyboardInterrupt as stopped:
        code = _stopped(stopped)
    except BrokenPipeError as error:
        # a reader that left is no fault of the job; but one that was told of a stop decides nothing
        told = error.__context__
        code = _stopped(told) if isinstance(told, KeyboardInterrupt) else 0
    except Exception as error:  # noqa: BLE001  the contract: a bug is one line and a report
        if DEBUG in sys.argv:
            traceback.print_exc()
        said = _said(error)
        _tell(f"expertly: {said}\n")
        code = said.exit_code
    for stream in (sys.stdout, sys.stderr):
        _let_go(stream)
    for signum in (signal.SIGTERM, signal.SIGINT):
        # the interpreter takes its time to end, and would die of them: the job's code stands
        atexit.register(signal.signal, signum, signal.SIG_IGN)
    sys.exit(code)


def _stopped(error: KeyboardInterrupt) -> int:
    """The exit code after a signal."""
    _tell("expertly: stopped\n")
    return 128 + getattr(error, "signum", signal.SIGINT)


def _tell(text: str) -> None:
    """Text on stderr, for whoever may still be there."""
    with suppress(OSError):
        sys.stderr.write(text)


def _let_go(stream: TextIO) -> None:
    """Flush; what cannot be written must not become the exit code when the interpreter ends."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _run(arguments: list[str]) -> int:
    import typer

    from expertly.cli.app import app

    command = typer.main.get_command(app)
    try:
        # not app(), which turns Ctrl-C and a broken pipe into exits of its own
        with command.make_context("expertly", arguments or ["--help"]) as context:
            command.invoke(context)
    except typer.Exit as ended:
        return ended.exit_code
    except typer.Abort as error:
        raise KeyboardInterrupt from error
    except Exception as error:
        if not hasattr(error, "format_message"):  # all of typer's usage errors have it
            raise
        why = error.format_message().rstrip(".?")
        path = getattr(getattr(error, "ctx", None), "command_path", "expertly")
        raise ExpertlyError("E208", "command line", why, fix=f"see {path} --help") from error
    return 0


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Stopped(signum)


def _said(error: Exception) -> ExpertlyError:
    """What the user is told of an error."""
    if isinstance(error, ExpertlyError):
        return error
    if is_out_of_memory(error):
        fix = "close other programs, or choose something smaller"
        return memory_error("this machine", error, fix=fix)
    return _bug(error)


def _bug(error: Exception) -> ExpertlyError:
    """The E999 for an error nobody foresaw, with its traceback saved for a report."""
    what, why = type(error).__name__, " ".join(str(error).split())[:200] or "no message"
    try:
        handle, name = tempfile.mkstemp(prefix="expertly-bug-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8") as report:
            report.write(traceback.format_exc())
        fix = f"report it with the file {name}"
    except OSError:  # no room for a report either
        fix = f"run it again with {DEBUG} and report what it prints"
    return ExpertlyError("E999", what, why, fix=fix)


if __name__ == "__main__":
    main()
