from tests.images.test_lifecycle import *  # noqa: F403
