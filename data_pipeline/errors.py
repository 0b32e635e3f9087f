"""The one exception of the data side (and of the framework) that is meant for the user's eyes.

A `UserError` is raised for bad input, never for a bug: its message is ONE line that names the file, the value, the rule
that it breaks and the remedy. The command line prints that line alone and exits with code 2; everything else that
reaches the top is a defect and keeps its traceback.
"""


class UserError(ValueError):
    """Bad input; the message is one line: which file, which value, which rule, what to do about it."""
