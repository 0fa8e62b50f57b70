from tests.images.test_touching import *  # noqa: F403
