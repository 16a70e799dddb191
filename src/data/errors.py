"""Mistakes that a user can mend; shown without a traceback."""


class UserError(ValueError):
    """Ends the run. Names the offending value, what was expected, and the way out."""


class BadRecord(ValueError):
    """One record cannot be used. Says why; whoever reads the file knows which record it is."""
