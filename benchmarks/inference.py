"""How fast is a forward pass, one image at a time? In XLA and, if kdjax[export] is installed, in onnxruntime.

    python benchmarks/inference.py --detector=rtmdet_tiny --sizes=320,640
    python benchmarks/inference.py --detector=rtmdet_tiny --sizes=320 --onnx=FILE    # beside another's network

Weights are random. It measures what `kdjax latency` does, from the normalisation to the head's maps; files
given with --onnx, such as mmdetection's export of the same network, are timed in the same session, in turn, twice.
"""

import argparse
import tempfile
from pathlib import Path

import jax

from kdjax import detectors, weights
from kdjax.commands import latency


def words(text: str) -> list[str]:
    """Splits at commas: "a,b" -> ["a", "b"]."""
    return [word for word in text.split(",") if word]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detector", default="rtmdet_tiny", choices=detectors.names())
    parser.add_argument("--sizes", type=words, default=["320", "640"], help="sides of the images in pixels")
    parser.add_argument("--onnx", type=words, default=[], help="files that are timed as they are")
    parser.add_argument("--threads", type=int, help="all cores by default")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--classes", type=int, default=80)
    args = parser.parse_args()
    detector = detectors.build(args.detector, args.classes)
    params, stats = detector.init(jax.random.PRNGKey(0))
    with tempfile.TemporaryDirectory() as folder:
        models = []
        for side in map(int, args.sizes):
            models.append(f"{folder}/{args.detector}_{side}")
            names = [f"class {i}" for i in range(args.classes)]
            weights.save(Path(models[-1]), detector, params, stats, classes=names, image_size=(side, side))
        for _ in range(2):
            latency.run(models=[*models, *args.onnx], threads=args.threads, runs=args.runs, out=None)


if __name__ == "__main__":
    main()
