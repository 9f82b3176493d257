"""Images that the tests of signals train on."""

from pathlib import Path

import pytest

from tests.helpers.images import write_image_folder


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("data") / "pictures", images_per_class=16)
