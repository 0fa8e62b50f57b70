from tests.images.test_publishing import *  # noqa: F403
