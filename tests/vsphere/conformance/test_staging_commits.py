from tests.images.test_staging_commits import *  # noqa: F403
