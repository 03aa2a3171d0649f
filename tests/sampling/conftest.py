import pytest
from small_model import random_params


@pytest.fixture(scope="session")
def params():
    """Of the small model, in the training layout."""
    return random_params()
