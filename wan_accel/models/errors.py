"""What is raised for weights that cannot be used. Torch-free."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: what, where, what to do."""


class ReadBackError(RuntimeError):
    """What was written is not read back as it was meant."""
