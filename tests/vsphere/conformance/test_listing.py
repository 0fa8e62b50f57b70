from tests.images.test_listing import *  # noqa: F403
