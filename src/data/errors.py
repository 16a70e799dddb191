"""Exceptions for invalid input, and helpers that classify other exceptions."""


class UserError(ValueError):
    """An error that the user can fix; shown without a traceback. The message states what is wrong and how to fix it."""


INTERRUPTED = 130  # exit status after Ctrl-C by shell convention (128 + SIGINT)


def interrupted(error: BaseException | None) -> bool:
    """Return whether Ctrl-C caused `error`, directly or indirectly: interrupted worker pools raise other errors."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def out_of_memory(error: BaseException) -> bool:
    """Return whether `error` is an out-of-memory error (on CPU, a RuntimeError identifiable only by its message)."""
    words = any(text in str(error) for text in ("out of memory", "allocate memory"))
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or words


class BadRecord(ValueError):
    """An invalid record. The message states the reason; the caller, which knows the file, adds the location."""
