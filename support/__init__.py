"""Everything around the models that a reader may skip. Nothing here imports train.py."""


class UserError(Exception):
    """What the user can put right, in one line: what happened, where, what was expected, what to do."""

    def __init__(self, message):
        super().__init__(shorten(one_line(message), 1500))


def one_line(error):
    """What an exception says, in one line. From a DataLoader worker it is a traceback's last one."""
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
    """What an exception says, without number and path where it is the system's."""
    return getattr(error, "strerror", None) or one_line(error) or repr(error)
