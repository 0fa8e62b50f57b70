from tests.images.test_validation import *  # noqa: F403
