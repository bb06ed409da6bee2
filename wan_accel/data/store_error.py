"""The one error of the on-disk protocol."""


class StoreError(ValueError):
    """A dataset folder that cannot be used: what, where, what to do."""
