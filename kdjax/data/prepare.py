"""Prepares stock TFDS directories, which `config.data.source=tfds` then reads. Only this needs TensorFlow.

pip install 'kdjax[tfds]'
python -m kdjax.data.prepare --data_dir=DIR coco/2017 voc/2007 voc/2012
"""

import argparse
import importlib.util

import tensorflow_datasets as tfds

SETS = ("coco/2017", "voc/2007", "voc/2012")


def main(arguments: list[str] | None = None) -> None:
    """Downloads what is not there yet, and writes DIR/coco/2017/1.1.0 and so on, once each."""
    parser = argparse.ArgumentParser(prog="kdjax.data.prepare", description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True, help="where the directories go")
    parser.add_argument("--archives", help="a folder with archives that were downloaded before")
    parser.add_argument("sets", nargs="+", metavar="SET", choices=SETS, help=", ".join(SETS))
    chosen = parser.parse_args(arguments)
    if importlib.util.find_spec("tensorflow") is None:
        parser.error("TFDS's builders need TensorFlow: pip install 'kdjax[tfds]' (training does not need it)")
    for name in chosen.sets:
        # Records that can be read in any order, and without TensorFlow.
        builder = tfds.builder(name, data_dir=chosen.data_dir, file_format="array_record")
        config = tfds.download.DownloadConfig(
            manual_dir=chosen.archives, compute_stats=tfds.download.ComputeStatsMode.SKIP
        )
        builder.download_and_prepare(download_config=config)
        print(f"{name}: {builder.data_path}")


if __name__ == "__main__":
    main()
