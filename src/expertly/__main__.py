"""The command line's only door: run a verb, turn every error into one line and an exit code."""

import os
import sys
import tempfile
import traceback
from pathlib import Path

from expertly.errors import ExpertlyError


def main() -> None:
    """Run `expertly ARGS` and exit with the code of the error contract (docs/errors.md)."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        code = _run(arguments)
    except ExpertlyError as error:
        if debug:
            traceback.print_exc()
        sys.stderr.write(f"expertly: {error}\n")
        code = error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("expertly: stopped\n")
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:  # noqa: BLE001  the contract: a bug is one line and a report
        if debug:
            traceback.print_exc()
        sys.stderr.write(f"expertly: {_bug(error)}\n")
        code = 6
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    import typer

    from expertly.cli.app import app

    try:
        result = app(arguments, standalone_mode=False)
    except typer.Abort as error:
        raise KeyboardInterrupt from error
    except Exception as error:
        if not hasattr(error, "format_message"):  # all of typer's usage errors have it
            raise
        why = error.format_message().rstrip(".?")
        fix = "see expertly --help"
        raise ExpertlyError("E208", "command line", why, fix=fix) from error
    return result if isinstance(result, int) else 0


def _bug(error: Exception) -> ExpertlyError:
    """The E999 for an error nobody foresaw, with its traceback saved for a report."""
    handle, name = tempfile.mkstemp(prefix="expertly-bug-", suffix=".txt")
    os.close(handle)
    Path(name).write_text(traceback.format_exc(), encoding="utf-8")
    what = type(error).__name__
    why = " ".join(str(error).split())[:200] or "no message"
    return ExpertlyError("E999", what, why, fix=f"report it with the file {name}")


if __name__ == "__main__":
    main()
