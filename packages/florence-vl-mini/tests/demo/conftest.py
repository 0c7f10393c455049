"""A small mini suite for the demo's tests: the first pictures of the full suite."""

import pytest


@pytest.fixture(scope="module")
def small_suite(tmp_path_factory):
    """`suite_sample` reads it instead of the whole suite."""
    pytest.importorskip("florence_vl_mini")
    from florence_vl_mini import suite as mini

    folder = tmp_path_factory.mktemp("suite")
    mini._write(folder, mini.mini_rows(pictures=14))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("florence_vl_mini.demo.scoring.mini_folder", lambda: folder)
        yield folder
