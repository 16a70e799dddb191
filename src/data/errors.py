"""Mistakes that a user can mend; shown without a traceback."""


class UserError(ValueError):
    """Ends the run. Names the offending value, what was expected, and the way out."""


INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it


def interrupted(error: BaseException | None) -> bool:
    """Whether an error comes of Ctrl-C: worker pools raise others while they are taken down."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


class BadRecord(ValueError):
    """One record cannot be used. Says why; whoever reads the file knows which record it is."""
