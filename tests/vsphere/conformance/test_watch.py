from tests.images.test_watch import *  # noqa: F403
