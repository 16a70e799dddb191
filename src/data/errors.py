"""User errors, shown without a traceback, and classification of other exceptions."""


class UserError(ValueError):
    """Error that the user can fix. The message gives the invalid value, the expected value and the fix."""


INTERRUPTED = 130  # exit status after Ctrl-C by shell convention (128 + SIGINT)


def interrupted(error: BaseException | None) -> bool:
    """Return whether Ctrl-C caused an error, directly or in its chain: worker pools raise other errors on shutdown."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out. On CPU, torch raises a RuntimeError that only its message identifies."""
    words = any(text in str(error) for text in ("out of memory", "allocate memory"))
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or words


class BadRecord(ValueError):
    """Invalid record. The message gives the reason; the caller that reads the file adds the location."""
