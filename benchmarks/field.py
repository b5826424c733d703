"""The studies of the league: which method helps on which images, method by method and seed by seed.

    python benchmarks/field.py person --seed=0 --data=DIR/coco_half --weights=DIR --workdir=runs/field
    kdjax league benchmarks/studies/*.json --out=runs/league

`scenes` needs neither --data nor --weights. `bccd`, `neu` and `pcb` need --data, and train their teachers first: a
COCO folder of BCCD, the folder with NEU-DET's `IMAGES` and `ANNOTATIONS` (1,770 images of steel, 6 classes), the folder
with DeepPCB's `trainval.txt` and `test.txt` (1,500 of circuit boards, 6 classes). `person` and `coco` need the half of
COCO val2017 that holds a person (80 classes, a COCO folder) and a folder with `rtmdet_nano_person.onnx` and, for
`coco`, `yolox_nano.onnx`; their students start from one that was trained on the same images without a teacher, which
stands for the weights from ImageNet that are usual. That of `coco`, RTMDet-nano, begins with the published weights for
persons: 80 classes are too many for random weights and so few steps. Each finished run is added to
`benchmarks/studies/NAME_SEED.json`, the study.json of the seed, at once: the same command goes on with the runs that
the file lacks, on any machine. `kdjax` does all the work.
"""

import argparse
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from kdjax import files

STUDIES = Path(__file__).parent / "studies"
# all that run on RTMDet
ALL = ("mkd,rtmdet_cwd,cwd,pkd,ssim,rm,pfi,yao,fgd,mgd,crosskd,bckd,defeat,dkd,fgfi,fitnet,fkd,gid,hinton").split(",")
FOUR = ["mkd", "rtmdet_cwd", "cwd", "pkd"]
# Small sets, whose teacher is trained first, from the quickstart's.
OWN = ("--config=quickstart", "--config.optimizer.lr=0.003", "--config.optimizer.warmup=40",
       "--config.data.augment.scale=(0.7,1.4)", "--config.ema.ramp=80", "--config.eval.every=0")  # fmt: skip
# Photographs at 320 px, three views of each image, so that the teacher's cache serves all methods and seeds.
COCO = ("--config=distill/coco_folder", "--config.steps=500", "--config.batch_size=8", "--config.optimizer.lr=0.003",
        "--config.optimizer.warmup=50", "--config.ema.ramp=100", "--config.eval.every=0",
        "--config.checkpoint.every=500", "--config.data.views=3")  # fmt: skip
FLAGS = {
    "scenes": ("--config=quickstart", "--config.eval.every=0"),
    "bccd": (*OWN, "--config.data.source=coco_folder", "--config.data.image_size=(128,160)", "--config.steps=300",
             "--config.checkpoint.every=300"),
    "neu": (*OWN, "--config.data.source=voc_folder", "--config.data.image_size=(160,160)", "--config.steps=600",
            "--config.checkpoint.every=600"),
    "pcb": (*OWN, "--config.data.source=coco_folder", "--config.data.image_size=(320,320)", "--config.steps=600",
            "--config.checkpoint.every=600"),
    "person": (*COCO, "--config.teacher.detector=rtmdet_nano"),
    "coco": (*COCO, "--config.teacher.detector=yolox_nano"),
}  # fmt: skip
STUDENTS = {
    "person": ("--config.student.detector=rtmdet_nano", "--config.student.options.widen=0.125"),
    "coco": ("--config.student.detector=rtmdet_nano",),
}
TEACHER_STEPS = {"bccd": 400, "neu": 1200, "pcb": 1200}
START_STEPS = {"person": 2400, "coco": 1200}
METHODS = dict.fromkeys(("scenes", "bccd"), ALL)  # of the others FOUR
WEIGHTS = {"bccd": ("auto", "published")}  # of the others "auto"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=FLAGS)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--data", type=Path, help="folder of the images")
    parser.add_argument("--weights", type=Path, help="folder of the published weights")
    parser.add_argument("--methods", help="A,B: only these")
    parser.add_argument("--workdir", type=Path, required=True)
    args = parser.parse_args(arguments)
    flags = [*FLAGS[args.study], *of_inputs(args)]
    workdir, kept = args.workdir / args.study / str(args.seed), STUDIES / f"{args.study}_{args.seed}.json"
    if kept.exists() and not (workdir / "study.json").exists():
        workdir.mkdir(parents=True, exist_ok=True)
        shutil.copy(kept, workdir / "study.json")
    finished = rows_in(kept) if kept.exists() else set()
    methods = args.methods.split(",") if args.methods else METHODS.get(args.study, FOUR)
    for weight, method in itertools.product(WEIGHTS.get(args.study, ("auto",)), methods):
        if (method if weight == "published" else f"{method}, {weight}") in finished:
            continue
        kdjax("study", "methods", f"--methods={method}", f"--weights={weight}", "--seeds=1",
              f"--first={args.seed}", f"--workdir={workdir}", *flags)  # fmt: skip
        STUDIES.mkdir(exist_ok=True)
        keep(workdir / "study.json", kept, {"WORKDIR": args.workdir, "DATA": args.data, "WEIGHTS": args.weights})


def keep(study: Path, kept: Path, folders: Mapping[str, Path | None]) -> None:
    """Copies a study.json with names in the place of this machine's folders."""
    text = json.dumps({key: value for key, value in json.loads(study.read_text()).items() if key != "sha256"})
    for name, folder in folders.items():
        text = text.replace(json.dumps(str(folder.resolve()))[1:-1], name) if folder else text
    files.write_json(kept, files.sealed(json.loads(text)), indent=1)


def rows_in(kept: Path) -> set[str]:
    """The rows of a study.json that hold all their runs: "mkd", and "mkd, auto" with a weight that sets itself."""
    rows = [row for one in json.loads(kept.read_text())["studies"].values() for row in one["rows"]]
    return {row["what"] for row in rows} - {row["what"] for row in rows if row["failed"]}


def of_inputs(args: argparse.Namespace) -> list[str]:
    """The flags that say where images and weights are; what must be made of them first is made."""
    if args.study == "scenes":
        return []
    own = args.study in TEACHER_STEPS
    if None in ([args.data] if own else [args.data, args.weights]):
        raise SystemExit(f"{args.study}: give --data=DIR{'' if own else ' and --weights=DIR'}")
    if own:
        root = {"bccd": coco, "neu": steel, "pcb": boards}[args.study](args)
        return [f"--config.data.root={root}", f"--config.teacher.weights={teacher(args, root)}"]
    name, images = {"coco": ("yolox_nano", coco), "person": ("rtmdet_nano_person", persons)}[args.study]
    root = images(args)
    flags = [
        f"--config.data.root={root}",
        f"--config.teacher.weights={(args.weights / f'{name}.onnx').resolve()}",
        f"--config.teacher.cache={(args.workdir / 'caches' / args.study).resolve()}",
        *STUDENTS[args.study],
        f"--config.student.weights={start(args, root)}",
    ]
    every, *others = FLAGS[args.study]  # one cache for all methods
    kdjax("cache", f"{every}:{'+'.join(FOUR)}", "--config.twin=False", *others, *flags)
    return flags


def teacher(args: argparse.Namespace, root: Path) -> Path:
    """The student folder of rtmdet_micro on the images of a study."""
    workdir = args.workdir.resolve() / f"{args.study}_teacher"
    if not (workdir / "results.json").exists():
        steps = TEACHER_STEPS[args.study]
        alike = [flag for flag in FLAGS[args.study] if not re.match("--config(=|.steps|.checkpoint)", flag)]
        kdjax("train", "--config=supervised/coco_folder:rtmdet_micro", *alike, f"--config.data.root={root}",
              f"--config.steps={steps}", "--config.batch_size=8", "--config.student.weights=quickstart_teacher",
              f"--workdir={workdir}")  # fmt: skip
    return workdir / "student"


def start(args: argparse.Namespace, root: Path) -> Path:
    """The folder of the student that all runs start from, trained on the same images without a teacher."""
    workdir = args.workdir.resolve() / f"{args.study}_start"
    if not (workdir / "results.json").exists():
        alike = [flag for flag in COCO if not re.match("--config(=|.steps|.checkpoint|.data.views)", flag)]
        steps, published = START_STEPS[args.study], (args.weights / "rtmdet_nano_person.onnx").resolve()
        first = [f"--config.student.weights={published}"] if args.study == "coco" else []
        kdjax("train", "--config=supervised/coco_folder:rtmdet_nano", *STUDENTS[args.study], *first, *alike,
              f"--config.data.root={root}", f"--config.steps={steps}", "--config.checkpoint.every=400",
              f"--workdir={workdir}")  # fmt: skip
    return workdir / "student"


def coco(args: argparse.Namespace) -> Path:
    """A COCO folder as it is."""
    return args.data.resolve()


def steel(args: argparse.Namespace) -> Path:
    """A VOC folder of NEU-DET; of each class every fifth image is for validation."""
    root = args.workdir.resolve() / "neu"
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True, exist_ok=True)
    for ours, theirs in (("JPEGImages", "IMAGES"), ("Annotations", "ANNOTATIONS")):
        if not (root / ours).exists():
            (root / ours).symlink_to(args.data.resolve() / theirs)
    numbers = {file.stem: int(file.stem.rpartition("_")[2]) for file in sorted((root / "JPEGImages").iterdir())}
    for split, chosen in (("train", False), ("val", True)):
        names = [name for name, number in numbers.items() if (number % 5 == 0) == chosen]
        (lists / f"{split}.txt").write_text("\n".join(names) + "\n")
    return root


def boards(args: argparse.Namespace) -> Path:
    """A COCO folder of DeepPCB's 1,000 images for training and 500 for testing."""
    root = args.workdir.resolve() / "pcb"
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "images").mkdir(exist_ok=True)
    names = ("open", "short", "mousebite", "spur", "copper", "pin-hole")  # of its types 1 to 6
    for split, listed in (("train", "trainval.txt"), ("val", "test.txt")):
        if not (root / "images" / split).exists():
            (root / "images" / split).symlink_to(args.data.resolve())
        images, boxes = [], []
        for image, labels in (line.split() for line in (args.data / listed).read_text().splitlines()):
            name = image.replace(".jpg", "_test.jpg")
            images.append({"id": len(images) + 1, "file_name": name, "width": 640, "height": 640})
            for line in (args.data / labels).read_text().split("\n"):
                if line.strip():
                    left, top, right, bottom, kind = (int(word) for word in re.split("[ ,]+", line.strip()))
                    sides = right - left, bottom - top
                    boxes.append({"id": len(boxes) + 1, "image_id": len(images), "category_id": kind, "iscrowd": 0,
                                  "bbox": [left, top, *sides], "area": sides[0] * sides[1]})  # fmt: skip
        categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
        content = {"images": images, "annotations": boxes, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def persons(args: argparse.Namespace) -> Path:
    """A COCO folder with the same images and the boxes of persons alone."""
    root = args.workdir.resolve() / "coco_person"
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    if not (root / "images").exists():
        (root / "images").symlink_to(args.data.resolve() / "images")
    for file in sorted((args.data / "annotations").glob("instances_*.json")):
        read = json.loads(file.read_text())
        [category] = [entry for entry in read["categories"] if entry["name"] == "person"]
        read["categories"] = [category]
        read["annotations"] = [entry for entry in read["annotations"] if entry["category_id"] == category["id"]]
        (root / "annotations" / file.name).write_text(json.dumps(read))
    return root


def kdjax(*words: str) -> None:
    """Runs a command of kdjax; raises if it fails."""
    subprocess.run([sys.executable, "-m", "kdjax", *words], check=True)


if __name__ == "__main__":
    main()
