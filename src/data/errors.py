"""Mistakes that a user can mend; shown without a traceback."""


class UserError(ValueError):
    """Ends the run. Names the offending value, what was expected, and the way out."""


INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it


def interrupted(error: BaseException | None) -> bool:
    """Whether an error comes of Ctrl-C: worker pools raise others while they are taken down."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out. On a CPU torch raises RuntimeError, known by its words alone."""
    words = any(text in str(error) for text in ("out of memory", "allocate memory"))
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or words


class BadRecord(ValueError):
    """One record cannot be used. Says why; whoever reads the file knows which record it is."""
