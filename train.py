"""`kdjax train` from a checkout: `python train.py --config=configs/NAME.py --workdir=DIR`."""

import sys

from kdjax.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
