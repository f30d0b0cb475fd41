"""The one exception that stands for something the user can mend.

Raised with a sentence that names what was given, what is allowed and what to do next; the command line prints
that sentence without a traceback and exits with code 2. Everything else that escapes is a fault of ours (code 1).
"""


class UserError(ValueError):
    """A fault in the user's input (option, file, data set, checkpoint), told in one sentence."""
