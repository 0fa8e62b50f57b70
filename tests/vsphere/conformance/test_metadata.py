from tests.images.test_metadata import *  # noqa: F403
