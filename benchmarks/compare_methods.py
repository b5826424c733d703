"""Which method helps? The study `methods` of kdjax/study.py, under the name under which benchmarks are looked for.

python benchmarks/compare_methods.py --workdir=runs/compare --methods=mkd,rtmdet_cwd --seeds=3
"""

import sys

from kdjax.commands import study

if __name__ == "__main__":
    study.main(["methods", *sys.argv[1:]])
