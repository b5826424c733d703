"""The command that prepares TFDS directories."""

import importlib.util

import pytest

from kdjax.data import prepare


@pytest.mark.user_input(
    "TFDS directories", "preparing a directory without TensorFlow", "refused: `pip install 'kdjax[tfds]'`"
)
def test_preparing_names_the_missing_tensorflow(tmp_path, capsys):
    if importlib.util.find_spec("tensorflow"):
        pytest.skip("it is installed")
    for arguments, words in [
        (["coco/2017"], "TFDS's builders need TensorFlow: pip install 'kdjax"),
        (["coco/2014"], "invalid choice: 'coco/2014'"),
    ]:
        with pytest.raises(SystemExit):
            prepare.main([f"--data_dir={tmp_path}", *arguments])
        assert words in capsys.readouterr().err
