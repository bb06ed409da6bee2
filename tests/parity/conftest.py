import pytest
from preprocess_goldens import arrays, source_metas


@pytest.fixture(scope="session")
def metas():
    """Metas of the synthetic driving clip."""
    return source_metas(arrays("01_inputs")["src_kps"])
