from tests.images.test_in_use import *  # noqa: F403
