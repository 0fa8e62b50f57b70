from tests.images.test_copy import *  # noqa: F403
