"""The error contract: one line that says what, why and the one action that fixes it."""

import difflib
from collections.abc import Iterable

# Every code that a user can meet. Its first digit settles the exit code; docs/errors.md lists them.
CODES = {
    "E101": "a receipt's check failed",
    "E102": "a comparison never reached its target",
    "E201": "unknown config key",
    "E202": "config value of the wrong type or out of range",
    "E203": "config file missing or unreadable",
    "E204": "routing policy refused",
    "E205": "output folder in the way or missing what a resume needs",
    "E206": "resume with a changed config or changed data",
    "E207": "optional package missing",
    "E208": "command line wrong",
    "E209": "EXPERTLY_FAULT names no known fault",
    "E210": "folder in use by another process",
    "E211": "output folder not writable",
    "E301": "file or tensor missing, truncated or of the wrong size",
    "E302": "sha256 mismatch",
    "E303": "data source missing or empty",
    "E304": "data line unreadable",
    "E305": "not a model folder",
    "E306": "model family unknown or refused",
    "E307": "no tokenizer",
    "E310": "pickle refused",
    "E311": "chat template refused",
    "E401": "disk full or not writable",
    "E402": "out of memory",
    "E501": "training unhealthy: loss or gradient is not a number",
    "E502": "training unhealthy: the loss jumped",
    "E503": "training unhealthy: a router collapsed",
    "E504": "a router was not watched: its hook did not fire",
    "E999": "a bug in expertly",
}
_EXIT = {"1": 1, "2": 2, "3": 3, "4": 4, "5": 5, "9": 6}


class ExpertlyError(Exception):
    """An error that the user can act on; printed as one line, never as a traceback."""

    def __init__(self, code: str, what: str, why: str, *, fix: str):
        assert code in CODES, f"give {code} a line in CODES"
        self.code, self.what, self.why, self.fix = code, what, why, fix
        line = f"error[{code}] {what}: {why}. FIX: {fix}"
        super().__init__(" ".join(line.split()))  # one line, whatever a path or a library says

    @property
    def exit_code(self) -> int:
        """The process's exit status: 1 check, 2 usage, 3 input, 4 machine, 5 training, 6 bug."""
        return _EXIT[self.code[1]]


class Stopped(KeyboardInterrupt):
    """SIGTERM or Ctrl-C ended the job; the process's exit status is 128 + signum."""

    def __init__(self, signum: int):
        self.signum = signum
        super().__init__(signum)


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a misspelt word: the nearest known one, or all of them when none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"write {close[0]}" if close else f"choose one of {', '.join(names)}"
