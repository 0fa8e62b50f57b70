from tests.images.test_staging import *  # noqa: F403
