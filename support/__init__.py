"""The parts around models and training, which a reader may skip. Nothing here imports train.py."""


class UserError(Exception):
    """An error that the user can fix, in one line: where, what happened, what was expected, what to do."""

    def __init__(self, message):
        super().__init__(shorten(one_line(message), 1500))


def one_line(error):
    """The message of an exception in one line; of a DataLoader worker's, the last line of its traceback."""
    text = str(error).strip()
    if "Traceback (most recent call last)" in text:
        text = text.splitlines()[-1].split("UserError: ", 1)[-1]
    return visible(text)


def visible(text):
    """A text without line breaks, control characters and halves of characters: safe to print or to store."""
    return "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in text)


def shorten(text, limit):
    """A text without its middle if it is longer than `limit` characters; a path has up to 4096."""
    return text if len(text) <= limit else f"{text[:limit // 2]} ... {text[-limit // 2:]}"


def reason(error):
    """The message of an exception; without number and path if it comes from the system."""
    return getattr(error, "strerror", None) or one_line(error) or repr(error)
