"""The one exception that is meant for the person at the keyboard.

Its message is a single sentence that names the value, what is allowed, and the fix. Scripts print it without a
traceback and exit with code 2; any other exception is a defect of this project and keeps its traceback.
"""


class UserError(ValueError):
    """A setting, a file or a directory that cannot be used as it is."""
