"""The errors that reach the user as a single line."""


class InputError(Exception):
    """Input that cannot be used: a config, a record, a file, weights.

    The message is one line that names the place and the advice, such as
    `data/dev.jsonl:17: no "tail"; add the column or map it with data.train.columns.tail=NAME`.
    A line end or control character in it (of an id, a label, a path) is shown as its escape.
    The command line prints it and exits with code 2; nothing is half-written.
    """

    def __init__(self, message: str):
        super().__init__("".join(one if one.isprintable() else repr(one)[1:-1] for one in message))


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its name."""
    return next(iter(str(error).splitlines()), type(error).__name__)


class DoesNotFit(InputError):
    """A run that takes more memory than a device has; the message says what would fit."""
