from tests.images.test_copy_formats import *  # noqa: F403
