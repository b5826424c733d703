"""What kdjax raises when the user's input cannot be used."""


class UserError(ValueError):
    """The input cannot be used; the message is one sentence: where, what is wrong, what would be right.

    The command line prints it without a traceback. A bug of kdjax's own is any other exception and keeps its traceback.
    """
