"""The exceptions that are meant for the person at the keyboard.

Their message is a single sentence that names the value, what is allowed, and the fix. Scripts print it without a
traceback and exit with `exit_code`; any other exception is a defect of this project and keeps its traceback.
"""

LIST_ITEM = "\n  - "  # begins a line of the only messages that have several: one line for each wrong setting


class UserError(ValueError):
    """A setting, a file or a directory that cannot be used as it is.

    Its text can always be printed: line breaks and control characters, which a file name or a foreign error may bring
    along, are escaped.
    """

    exit_code = 2

    def __str__(self):
        return LIST_ITEM.join(map(_printable, super().__str__().split(LIST_ITEM)))


class MachineError(UserError):
    """A disk or another part of the machine failed under a run that was in order."""

    exit_code = 1


def _printable(text):
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
