"""Files that several processes, or a killed one, touch."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from rtd_jax.base.files import check_writable


def test_a_folder_is_probed_by_many_at_once_and_nothing_is_left(tmp_path):
    """Two processes of one run begin in the same folder: neither may take away what the other has just written."""
    folder = tmp_path / "run"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(check_writable, [folder] * 2000))
    assert list(folder.iterdir()) == []


def test_a_file_in_the_way_is_refused_by_name(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match=r"cannot write in .*run: File exists; choose another folder with --workdir"):
        check_writable(tmp_path / "run")
