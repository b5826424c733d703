"""The command line: `kdjax COMMAND ...`, or `python -m kdjax COMMAND ...`.

The commands are one file each in `kdjax/commands/`; `train` is `kdjax.training.run.main`.

Nothing heavy is imported before the arguments are read.
"""

import argparse
import difflib
import functools
import importlib
import io
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from kdjax.errors import UserError, fault, interruptible, printable
from kdjax.export import targets
from kdjax.machine import keep_freed_memory

DESCRIPTION = "Distil object detectors: `kdjax COMMAND --help` has the options of a command."
MODEL = "a run's workdir, student/ or checkpoints/STEP, a folder of import-weights, an address, or quickstart_teacher"
CONFIG = "name of a config that comes with kdjax (quickstart, distill/dense, ...) or a file"
# The commands that look at one run: their function gets the config.
RUNS = {
    "train": ("kdjax.training.run", "main"),
    "doctor": ("kdjax.commands.doctor", "run"),
    "cache": ("kdjax.commands.cache", "run"),
    "compile": ("kdjax.commands.compile", "run"),
}
# These take --config.a.b=value.
OVERRIDABLE = ("train", "doctor", "cache", "compile", "study")
# These take --model more than once.
SEVERAL_MODELS = ("latency", "view")
# What follows the sentence on a fault of the machine.
_CONTINUES = "then run the same command again: it continues from the last checkpoint"
_CONTINUES_CACHE = "then run the same command again: it continues with the first file that is missing"
AGAIN: dict[str, str] = {"train": _CONTINUES, "study": _CONTINUES, "cache": _CONTINUES_CACHE}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      arguments: those of the command line; by default the process's own.

    Returns:
      Exit code: 0; 1 if the doctor found an error; 2 if an argument, setting, file or value cannot be used, which
      one sentence on stderr says; 75 if a host is lost; 130 after Ctrl-C; 143 if a run was stopped by SIGTERM.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may lack a character, or a file's name be no text
            stream.reconfigure(errors="backslashreplace")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser, flags = _parser()
    command = arguments[0] if arguments else ""
    if command and not command.startswith("-") and command not in flags:
        close = difflib.get_close_matches(command, flags, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        _fail(f"invalid choice: {command!r}{hint}: choose from {', '.join(flags)}", command="kdjax")
    if command in OVERRIDABLE:
        arguments = [text for text in arguments if text != "--"]
    marked = arguments[: arguments.index("--")] if "--" in arguments else arguments  # behind it are names of files
    _refuse_repeated(command, marked)
    if command in flags:
        _refuse_unknown(command, marked, flags)
        _refuse_empty(command, marked)
    known, rest = parser.parse_known_args(arguments)
    chosen = vars(known)
    command = chosen.pop("command")
    if command in OVERRIDABLE:
        chosen["overrides"] = rest
    elif rest:
        _fail(f"unexpected argument {rest[0]!r}", command=f"kdjax {command}")
    try:
        if command in RUNS:
            from kdjax.commands.settings import read

            chosen["config"] = read(chosen["config"], chosen.pop("overrides"))
        module, function = RUNS.get(command, (f"kdjax.commands.{command.replace('-', '_')}", "run"))
        run = getattr(importlib.import_module(module), function)
        keep_freed_memory()
        with interruptible():
            code = run(**chosen)
        _flush()
        return code
    except KeyboardInterrupt:
        return 130
    except (UserError, FloatingPointError) as error:
        text = sentence(error)
        if os.environ.get("KDJAX_TRACEBACK"):
            raise
    except Exception as error:
        if isinstance(error, OSError) and not error.filename:
            try:
                _flush("\n")  # was it the output?
            except OSError as same:
                error = same
        text = fault(error)
        if text is None or os.environ.get("KDJAX_TRACEBACK"):
            raise
        text += f"; {AGAIN.get(command, 'then run the same command again')}"
    print(f"kdjax: {text}", file=sys.stderr)
    return 2


def _flush(more: str = "") -> None:
    """Prints what is left, and more.

    Raises:
      OSError: it cannot be printed; nothing more is written to stdout, also not by Python at its end.
    """
    try:
        sys.stdout.write(more)
        sys.stdout.flush()
    except OSError as error:
        sys.stdout = open(os.devnull, "w")
        error.filename = "standard output"
        raise


def sentence(error: Exception) -> str:
    r"""An error message in one line; a list in it is cut after three entries.

    Example:
      >>> sentence(ValueError("5 differences:\n  a\n  b\n  c\n  d\n  e"))
      '5 differences: a; b; c; and 2 more'
    """
    first, *rest = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
    more = f"; and {len(rest) - 3} more" if len(rest) > 3 else ""
    return printable(" ".join([first, "; ".join(rest[:3])]).strip() + more)


def _refuse_repeated(command: str, arguments: Sequence[str]) -> None:
    """Refuses a flag that is given twice, because only one of its values could count."""
    allowed = {"--model"} if command in SEVERAL_MODELS else set()
    given: dict[str, list[str]] = {}
    for name, _, value in (text.partition("=") for text in arguments if text.startswith("--")):
        given.setdefault(name, []).append(value)
    for name, values in given.items():
        if len(values) > 1 and name not in allowed:
            which = f" ({', '.join(values)})" if all(values) else ""
            _fail(f"{name} appears more than once{which}: keep one", command=f"kdjax {command}".strip())


def _refuse_unknown(command: str, arguments: Sequence[str], flags: Mapping[str, Sequence[str]]) -> None:
    """Refuses a flag that a command does not have, and names the most similar flag or setting."""
    for text in arguments:
        name = text.partition("=")[0]
        known = name in flags[command] or (command in OVERRIDABLE and name.startswith("--config."))
        if not known and re.match("--?[a-zA-Z]", name):
            others = [other for other in flags if name in flags[other]]
            close = difflib.get_close_matches(name, flags[command], n=1, cutoff=0.7)
            setting = _setting(name) if command in OVERRIDABLE and not others else None
            if setting and close and setting.rpartition(".")[2] != name.lstrip("-").replace("-", "_"):
                setting = None  # a similar flag comes before a similar setting, and after one of the same name
            if others:
                hint = f": it is a flag of kdjax {' and '.join(others[:2])}"
            elif close or setting:
                hint = f" (did you mean {setting or close[0]}?)"
            else:
                hint = "; override settings with --config.a.b=value" if command in OVERRIDABLE else ""
            _fail(f"unexpected argument {text!r}{hint}", command=f"kdjax {command}")


def _refuse_empty(command: str, arguments: Sequence[str]) -> None:
    """Refuses a flag or a path without a value, as of a variable of the shell that is not set: "" is a folder too."""
    for text, before in zip(arguments, ["", *arguments], strict=False):
        name, given, value = text.partition("=")
        if given and not value and name.startswith("--") and not name.startswith("--config."):
            _fail(f"{name} is empty: give a value, or leave it out", command=f"kdjax {command}")
        if not text:
            what = before if before.startswith("--") and "=" not in before else "an argument"
            _fail(f"{what} is empty: give a value, or leave it out", command=f"kdjax {command}")


def _setting(flag: str) -> str | None:
    """The override that a flag without `config` stands for."""
    from kdjax.training.config import base, similar_setting

    name = similar_setting(flag.lstrip("-").replace("-", "_"), base())
    return name and f"--config.{name}"


def _fail(message: str, *, command: str) -> NoReturn:
    print(f"{command}: {message}; see `{command} --help`", file=sys.stderr)
    sys.exit(2)


def _parser() -> tuple[argparse.ArgumentParser, dict[str, list[str]]]:
    """The parser, and the flags of each command."""
    made_commands: dict[str, argparse.ArgumentParser] = {}
    parser = argparse.ArgumentParser(prog="kdjax", description=DESCRIPTION)
    parser.error = functools.partial(_fail, command="kdjax")  # one sentence instead of the usage
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, what: str, example: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=what,
            description=what,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        made.error = functools.partial(_fail, command=f"kdjax {name}")
        made_commands[name] = made
        return made

    def add_config(to: argparse.ArgumentParser) -> None:
        to.add_argument(
            "--config", required=True, metavar="NAME[:ARG]", help=f"{CONFIG}; --config.a.b=value overrides a setting"
        )

    def add_split(to: argparse.ArgumentParser) -> None:
        to.add_argument("--split", default="val", help="split, as in annotations/instances_SPLIT.json (val)")
        to.add_argument("--annotations", default="", metavar="FILE", help="the json (YOLO, VOC: folder), if elsewhere")
        to.add_argument("--images", default="", metavar="DIR", help="the images, if not in their usual place in DIR")
        to.add_argument(
            "--classes",
            default="",
            metavar="C",
            help="names of numbered classes: coco, voc, or a FILE",
        )
        to.add_argument("--limit", type=int, default=0, metavar="N", help="only the first N images")
        add_exif(to)

    def add_models(to: argparse.ArgumentParser, more: str) -> None:
        told = f"{MODEL}; {more}"
        to.add_argument("--model", required=True, action="append", dest="models", metavar="DIR", help=told)

    def add_exif(to: argparse.ArgumentParser) -> None:
        to.add_argument(
            "--exif",
            choices=("stored", "upright"),
            help="the stored pixels, or the images as EXIF's orientation turns them (as the model was trained)",
        )

    one = add(
        "train",
        "Train a student with a teacher, or a detector alone; the same command resumes an interrupted run.",
        "kdjax train --config=quickstart --workdir=runs/quickstart --config.steps=800",
    )
    add_config(one)
    one.add_argument("--workdir", metavar="DIR", help="folder for checkpoints, metrics, models and report.html")
    one.add_argument("--multihost", action="store_true", help="several hosts run the same command (jax.distributed)")
    one.add_argument(
        "--coordinator",
        default="",
        metavar="HOST:PORT",
        help="where host 0 is reached (found under Slurm, on TPUs, ...)",
    )
    one.add_argument("--bind", default="", metavar="ADDRESS:PORT", help="where host 0 listens, if that differs")
    one.add_argument("--hosts", type=int, metavar="N", help="number of hosts (found likewise)")
    one.add_argument("--host", type=int, metavar="I", help="number of this one, from 0 (found likewise)")
    one.add_argument(
        "--host-timeout",
        type=float,
        metavar="S",
        help="seconds without a heartbeat, after which a host counts as lost (60)",
    )

    one = add(
        "supervise",
        "Run a command, and run it again after a preemption, a kill or a lost host, as long as it makes progress.",
        "kdjax supervise -- kdjax train --config=quickstart --workdir=runs/quickstart",
    )
    one.add_argument("words", nargs="+", metavar="COMMAND", help="behind --: the command with its arguments")
    one.add_argument("--workdir", default="", metavar="DIR", help="folder with checkpoints/ (the --workdir of COMMAND)")
    one.add_argument("--max-restarts", type=int, default=3, metavar="N", help="in a row without a new checkpoint (3)")

    one = add(
        "doctor",
        "Check a run before it is started: input, class map, schedule, gradients, memory.",
        "kdjax doctor --config=quickstart --config.optimizer.lr=0.005",
    )
    add_config(one)

    one = add(
        "cache",
        "Write what a teacher says about training batches, for runs that read it instead of running the teacher.",
        "kdjax cache --config=quickstart:mkd+rm --config.data.views=4 --config.teacher.cache=caches/a",
    )
    add_config(one)

    one = add(
        "compile",
        "Compile the programs of a run into the cache, as for the image of a cluster; it trains nothing.",
        "kdjax compile --config=quickstart:cwd --config.batch_size=4 --config.data.scenes_train=40",
    )
    add_config(one)

    one = add(
        "replay",
        "Repeat a step of a run that was not finite, to the bit, and say which image, level and term began it.",
        "kdjax replay runs/quickstart/blackbox/step-40",
    )
    one.add_argument("folder", metavar="DIR", help="the inputs of the step, as the run names them: blackbox/step-N")

    one = add(
        "study",
        "Compare variants of a run over seeds, each with the gain over its seed's twin: a table and a chart.",
        "kdjax study methods --workdir=runs/study --methods=mkd,cwd --seeds=3 --config.steps=800",
    )
    one.add_argument(
        "name",
        choices=("methods", "components", "mask", "weight", "teacher", "sizes", "twins"),
        help="method; MKD's components, mask, weight or teacher; student's size; the seed alone",
    )
    one.add_argument(
        "--config",
        default="quickstart",
        metavar="NAME[:ARG]",
        help=f"{CONFIG}; it must take the methods as its last argument (quickstart)",
    )
    one.add_argument("--workdir", required=True, metavar="DIR", help="folder for the runs and the chart NAME.png")
    one.add_argument("--seeds", type=int, default=3, metavar="N", help="number of seeds (3)")
    one.add_argument("--first", type=int, default=0, metavar="N", help="the first seed (0)")
    one.add_argument(
        "--methods", default="", metavar="A,B+C", help="for the study `methods`; + adds methods up (all methods)"
    )
    one.add_argument(
        "--weights",
        default="",
        metavar="W,W",
        help="for the study `weight`: weights of MKD (0.1,1,5); for `methods`: published, auto, or both (published)",
    )
    one.add_argument(
        "--teachers",
        default="",
        metavar="DIR,DIR",
        help="for the studies `methods` and `teacher`: student/ folders of other runs",
    )
    one.add_argument(
        "--students",
        default="rtmdet_pico,rtmdet_micro",
        metavar="A,B",
        help="for the study `sizes`: detectors (rtmdet_pico,rtmdet_micro)",
    )
    one.add_argument(
        "--equal",
        choices=("steps", "time"),
        default="steps",
        help="what student and twin have alike; time adds a twin that is trained for as long (steps)",
    )
    one.add_argument(
        "--tune",
        type=int,
        default=0,
        metavar="K",
        help="before the table, K runs each for the learning rate and for the weights of each row (0: none)",
    )
    one.add_argument("--log", default="", metavar="FILE", help="a Markdown file to which the results are appended")

    one = add(
        "league",
        "Merge studies of several folders, machines or data sets into one table, as json, Markdown and a page.",
        "kdjax league runs/scenes runs/bccd --out=runs/league",
    )
    one.add_argument("paths", nargs="+", metavar="DIR", help="workdirs of studies, or their study.json")
    one.add_argument("--out", required=True, metavar="DIR", help="folder for league.json, league.md and league.html")

    one = add(
        "compare",
        "Put runs side by side, finished or not, as json and a page: results, curves, classes, settings that differ.",
        "kdjax compare runs/mkd runs/cwd --out=runs/compared",
    )
    one.add_argument("paths", nargs="+", metavar="RUN", help="workdirs of runs, two or more")
    one.add_argument("--out", required=True, metavar="DIR", help="folder for compare.json and compare.html")

    one = add(
        "predict",
        "Detect objects in images, folders and videos: drawn boxes, and COCO json.",
        "kdjax predict photos/ clip.mp4 --model=quickstart_teacher --out=predicted",
    )
    one.add_argument("paths", nargs="+", metavar="PATH", help="images, videos, folders of them")
    one.add_argument("--model", required=True, metavar="DIR", help=MODEL)
    one.add_argument("--out", required=True, metavar="DIR", help="folder for detections.json, images.json and drawn/")
    one.add_argument("--threshold", type=float, default=0.3, metavar="S", help="lowest score that is drawn (0.3)")
    add_exif(one)

    one = add(
        "label",
        "Write a model's detections as labels of images that have none: COCO json, what was kept, and a preview.",
        "kdjax label --model=runs/teacher --data=photos --labelled=DIR --out=photos.json",
    )
    one.add_argument("--model", required=True, metavar="DIR", help=MODEL)
    one.add_argument("--data", required=True, metavar="DIR", help="folder of images, with those below it")
    one.add_argument("--out", required=True, metavar="FILE", help="the COCO json to write; NAME.png shows some images")
    one.add_argument("--threshold", type=float, metavar="S", help="lowest score of a label, for all classes")
    one.add_argument(
        "--labelled", metavar="DIR", help="instead: labelled data, as for evaluate, on which each class gets its own"
    )
    one.add_argument(
        "--precision",
        type=float,
        metavar="P",
        help="share of the labels of a class that must be correct there (without: the largest F1)",
    )
    add_split(one)

    one = add(
        "evaluate",
        "Measure a model on labelled data, or compare two models: tables, json and a page.",
        "kdjax evaluate --model=quickstart_teacher --data=scenes --limit=40 --out=evaluated",
    )
    one.add_argument("--model", required=True, metavar="DIR", help=MODEL)
    one.add_argument("--against", metavar="DIR", help="another model, to compare with")
    one.add_argument(
        "--data",
        required=True,
        metavar="DIR",
        help="a folder in COCO, YOLO or VOC layout, or scenes",
    )
    add_split(one)
    one.add_argument("--out", metavar="DIR", help="folder for evaluation.json, detections.json and report.html")

    one = add(
        "view",
        "Look at what models detect in a folder of images, side by side, with thresholds to move; needs kdjax[view].",
        "kdjax view --model=runs/mkd/student --model=runs/mkd/twin --data=photos",
    )
    add_models(one, "repeat for several models")
    one.add_argument("--data", required=True, metavar="DIR", help="folder of images, with those below it")
    one.add_argument("--threshold", type=float, default=0.3, metavar="S", help="lowest score at the start (0.3)")
    one.add_argument(
        "--port", type=int, default=0, metavar="N", help="of the page on this machine (the first free one)"
    )
    add_exif(one)

    one = add(
        "latency",
        "Measure models and exported files: parameters, FLOPs, file size, and time per image in their runtimes.",
        "kdjax latency --model=quickstart_teacher --threads=1",
    )
    add_models(one, "an exported file (.onnx, .xml, .param or .tflite), or a folder of them; repeat for several")
    one.add_argument("--threads", type=int, metavar="N", help="cores to compute on (all that the process may use)")
    one.add_argument("--runs", type=int, default=100, metavar="N", help="timed runs, after 20 untimed ones (100)")
    one.add_argument("--out", metavar="FILE", help="also write the table as json")

    one = add(
        "export",
        "Write a model for another runtime, checked against the JAX model, with its AP before and after.",
        "kdjax export --model=quickstart_teacher --format=onnx --out=teacher.onnx --data=scenes --limit=40\n\n"
        f"targets:\n{targets.told()}",
    )
    one.add_argument("--model", required=True, metavar="DIR", help=MODEL)
    needs = "onnx needs kdjax[export], the next three kdjax[openvino], kdjax[ncnn], kdjax[litert]"
    one.add_argument("--format", choices=("onnx", "openvino", "ncnn", "litert", "stablehlo"), help=needs)
    one.add_argument(
        "--target",
        choices=(*targets.TARGETS, targets.ALL),
        help="a device: its format, precision and batch, where no flag says otherwise (table below); or all",
    )
    one.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help="the file to write (OpenVINO: .xml, NCNN: .param); with --target=all a folder",
    )
    one.add_argument("--data", metavar="DIR", help="labelled data to compare outputs and AP on, as for evaluate")
    add_split(one)
    one.add_argument(
        "--dtype",
        choices=("float32", "float16", "int8"),
        help="float16: ONNX, OpenVINO, NCNN; int8: ONNX, OpenVINO, LiteRT; both need --data, but not int8 of a model "
        "that was trained for it (float32)",
    )
    one.add_argument("--batch", metavar="N", help="images of a batch, or dynamic: any number; ONNX and OpenVINO (1)")
    one.add_argument("--raw", action="store_true", help="the maps of the head, without decoding and NMS")
    one.add_argument(
        "--max-ap-loss",
        type=float,
        metavar="POINTS",
        help="largest loss of AP that is accepted (0.1 for float32 and float16, 1 for int8)",
    )

    one = add(
        "import-weights",
        "Convert a checkpoint of mmdetection, mmyolo, mmrazor, YOLOX, RT-DETR or D-FINE to a folder for every command, "
        "or rename the classes of a kdjax model.",
        "kdjax import-weights rtmdet_tiny.pth --detector=rtmdet_tiny --out=rtmdet_tiny",
    )
    one.add_argument(
        "file",
        metavar="FILE",
        help=".pth, .pt, .ckpt or .bin (needs kdjax[torch]), .safetensors (or the index of several), .npz, or "
        ".onnx of YOLOX or RTMDet (needs onnx); or a kdjax model, as --model of other commands, with --classes",
    )
    one.add_argument("--detector", metavar="NAME", help="rtmdet_tiny, rtmdet_s, ...; not for a kdjax model")
    one.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    one.add_argument(
        "--classes",
        metavar="C",
        help="coco, voc, or a FILE: COCO json, or text with a name per line; needed if the file has no names",
    )
    one.add_argument(
        "--image-size",
        metavar="H,W",
        help="of the network input in pixels (640,640; rtmdet_nano 320,320; yolox_nano and yolox_tiny 416,416)",
    )
    one.add_argument(
        "--network", choices=("student", "teacher"), default="student", help="which network of an mmrazor checkpoint"
    )

    one = add(
        "push",
        "Upload a model with its card to the Hugging Face Hub (needs kdjax[hub]); hf://OWNER/NAME loads it.",
        "kdjax push runs/a/student OWNER/NAME --license=apache-2.0",
    )
    one.add_argument("model", metavar="MODEL_DIR", help="a run's workdir or student/, or a folder of import-weights")
    one.add_argument("repository", metavar="OWNER/NAME", help="on the Hub; it is made if it does not exist")
    one.add_argument("--license", default="", metavar="ID", help="written into the card, as in apache-2.0")
    one.add_argument("--private", action="store_true", help="a repository that is made is private")
    flags = {name: re.findall(r"(?<![\w-])--?[a-z][\w-]*", made.format_usage()) for name, made in made_commands.items()}
    return parser, {name: [*found, "--help"] for name, found in flags.items()}
