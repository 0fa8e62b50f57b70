from tests.images.test_copy_requests import *  # noqa: F403
