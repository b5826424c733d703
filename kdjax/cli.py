"""The command line: `kdjax VERB …`, or `python -m kdjax VERB …`. What a verb does is in `kdjax/verbs/VERB.py`.

Nothing heavy is imported before the arguments are read.
"""

import argparse
import functools
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

DESCRIPTION = "What comes after training (python train.py) and before it: `kdjax VERB --help` tells more."
MODEL = "a run's student/ folder, workdir or checkpoints/STEP, or a folder of import-weights"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Args:
      arguments: those of the command line; by default the process's own.

    Returns:
      Exit code: 0, 1 if the doctor found a fault, 2 after a sentence on stderr about something that the user can mend,
      130 after Ctrl-C.
    """
    parser = _parser()
    known, rest = parser.parse_known_args(arguments)
    chosen = vars(known)
    if chosen["verb"] == "doctor":
        chosen["changes"] = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    run = importlib.import_module(f"kdjax.commands.{chosen.pop('verb').replace('-', '_')}").run
    try:
        return run(**chosen)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        if os.environ.get("KDJAX_TRACEBACK"):
            raise
        from kdjax.train.config import sentence  # the verb has imported all that this needs

        print(f"kdjax: {sentence(error)}", file=sys.stderr)
        return 2


def _fail(message: str, *, command: str) -> NoReturn:
    print(f"{command}: {message}; `{command} --help` shows what is right", file=sys.stderr)
    sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kdjax", description=DESCRIPTION)
    parser.error = functools.partial(_fail, command="kdjax")  # one sentence instead of the usage
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, what: str, example: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(
            name,
            help=what,
            description=what,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        made.error = functools.partial(_fail, command=f"kdjax {name}")
        return made

    def part_of_data(one: argparse.ArgumentParser) -> None:
        one.add_argument("--split", default="val", help="of the folder (val): annotations/instances_SPLIT.json")
        one.add_argument("--annotations", default="", metavar="FILE", help="the json, if it lies elsewhere in DIR")
        one.add_argument("--images", default="", metavar="DIR", help="the images, if they lie elsewhere in DIR")
        one.add_argument("--limit", type=int, default=0, metavar="N", help="only the first N images")

    one = verb(
        "doctor",
        "Look at a run for a minute before it is started: input, class map, schedule, terms, memory.",
        "kdjax doctor --config=configs/quickstart.py --config.optimizer.lr=0.005",
    )
    one.add_argument(
        "--config", required=True, metavar="FILE[:ARG]", help="as for train.py, with any --config.a.b=value after it"
    )

    one = verb(
        "predict",
        "Detect objects in images, folders and videos: drawn boxes, and COCO's json.",
        "kdjax predict photos/ clip.mp4 --model=assets/quickstart_teacher --out=predicted",
    )
    one.add_argument("paths", nargs="+", metavar="PATH", help="images, videos, folders of them")
    one.add_argument("--model", required=True, metavar="DIR", help=MODEL)
    one.add_argument("--out", required=True, metavar="DIR", help="gets detections.json, images.json and drawn/")
    one.add_argument("--threshold", type=float, default=0.3, metavar="S", help="smallest score that is drawn (0.3)")

    one = verb(
        "evaluate",
        "Measure a model on data with boxes, or two models against each other: tables, json and a page.",
        "kdjax evaluate --model=assets/quickstart_teacher --data=scenes --limit=40 --out=evaluated",
    )
    one.add_argument("--model", required=True, metavar="DIR", help=MODEL)
    one.add_argument("--against", metavar="DIR", help="another model, to compare with")
    one.add_argument(
        "--data", required=True, metavar="DIR", help="a folder in COCO layout, or scenes (the quickstart's)"
    )
    part_of_data(one)
    one.add_argument("--out", metavar="DIR", help="gets evaluation.json, detections.json and report.html")

    one = verb(
        "latency",
        "Measure models: parameters, FLOPs, size of the file, and time for one image in XLA and onnxruntime.",
        "kdjax latency --model=assets/quickstart_teacher --threads=1",
    )
    one.add_argument(
        "--model",
        required=True,
        action="append",
        dest="models",
        metavar="DIR",
        help=f"{MODEL}, or an .onnx or .tflite file; again for more",
    )
    one.add_argument("--threads", type=int, metavar="N", help="cores to compute on (all that the process may use)")
    one.add_argument("--runs", type=int, default=100, metavar="N", help="timed runs, after 20 that are not timed (100)")
    one.add_argument("--out", metavar="FILE", help="also write the table as json")

    one = verb(
        "export",
        "Write a model as ONNX, LiteRT or StableHLO, checked against the JAX model, with its AP before and after.",
        "kdjax export --model=assets/quickstart_teacher --format=onnx --out=teacher.onnx --data=scenes --limit=40",
    )
    one.add_argument("--model", required=True, metavar="DIR", help=MODEL)
    needs = "onnx needs kdjax[export], litert kdjax[litert]"
    one.add_argument("--format", required=True, choices=("onnx", "litert", "stablehlo"), help=needs)
    one.add_argument("--out", required=True, metavar="FILE", help="the file to write")
    one.add_argument("--data", metavar="DIR", help="to check and measure on: as for evaluate")
    part_of_data(one)
    one.add_argument("--dtype", choices=("float32", "int8"), default="float32", help="int8: static quantisation, ONNX")
    one.add_argument("--raw", action="store_true", help="the head's maps, without decoding and suppression")
    one.add_argument(
        "--max-ap-loss", type=float, metavar="POINTS", help="of AP; more fails (0.1 for float32, 1 for int8)"
    )

    one = verb(
        "import-weights",
        "Turn a checkpoint of mmdetection, mmyolo, mmrazor or YOLOX into a folder that every verb and train.py read.",
        "kdjax import-weights rtmdet_tiny.pth --detector=rtmdet_tiny --out=rtmdet_tiny",
    )
    one.add_argument(
        "file", metavar="FILE", help=".pth (needs kdjax[torch]), .safetensors, .npz, or YOLOX's .onnx (needs onnx)"
    )
    one.add_argument("--detector", required=True, metavar="NAME", help="rtmdet_tiny, rtmdet_s, …")
    one.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    one.add_argument(
        "--classes", metavar="FILE", help="COCO json or text with a name a line; needed if the checkpoint tells none"
    )
    one.add_argument("--image-size", default="640,640", metavar="H,W", help="of the canvas, in pixels (640,640)")
    one.add_argument(
        "--network", choices=("student", "teacher"), default="student", help="which one of mmrazor's distiller"
    )
    return parser
