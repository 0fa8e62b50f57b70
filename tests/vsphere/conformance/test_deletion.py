from tests.images.test_deletion import *  # noqa: F403
