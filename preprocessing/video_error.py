"""What is said of a video that cannot be used."""


class UserVideoError(ValueError):
    """A video that cannot be used; the message says which, why and what to do."""
