"""Which Ulysses degrees a model can be run with. Torch-free."""


def usable_degrees(num_heads: int, *, limit: int = 16) -> list[int]:
    """Ulysses degrees that divide the heads, up to `limit`."""
    return [degree for degree in range(1, min(num_heads, limit) + 1) if num_heads % degree == 0]
