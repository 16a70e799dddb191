"""The one exception for mistakes that a user can mend; shown without a traceback."""


class UserError(ValueError):
    """Names the offending value, what was expected, and the way out."""
