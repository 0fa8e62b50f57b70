from tests.images.test_one_image import *  # noqa: F403
