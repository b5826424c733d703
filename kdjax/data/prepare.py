"""Downloads data sets and writes them as TFDS directories, which `config.data.source=tfds` then reads.

    pip install 'kdjax[tfds]'
    python -m kdjax.data.prepare --data_dir=DIR coco/2017 voc/2007 voc/2012

Only this module needs TensorFlow.
"""

import argparse
import importlib.util

import tensorflow_datasets as tfds

SETS = ("coco/2017", "voc/2007", "voc/2012")


def main(arguments: list[str] | None = None) -> None:
    """Downloads and writes the data sets of the command line that are not in --data_dir yet.

    Args:
      arguments: of the command line; None takes those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="kdjax.data.prepare", description="Downloads data sets and writes them as TFDS directories."
    )
    parser.add_argument("--data_dir", required=True, help="folder for the directories, as DIR/coco/2017/1.1.0")
    parser.add_argument("--archives", help="folder with archives that are already downloaded")
    parser.add_argument("sets", nargs="+", metavar="SET", choices=SETS, help=", ".join(SETS))
    chosen = parser.parse_args(arguments)
    if importlib.util.find_spec("tensorflow") is None:
        parser.error("TFDS's builders need TensorFlow: pip install 'kdjax[tfds]' (training does not need it)")
    for name in chosen.sets:
        # array_record: random access, and readable without TensorFlow.
        builder = tfds.builder(name, data_dir=chosen.data_dir, file_format="array_record")
        config = tfds.download.DownloadConfig(
            manual_dir=chosen.archives, compute_stats=tfds.download.ComputeStatsMode.SKIP
        )
        builder.download_and_prepare(download_config=config)
        print(f"{name}: {builder.data_path}")


if __name__ == "__main__":
    main()
