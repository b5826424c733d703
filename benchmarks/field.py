"""The studies of the league: which method helps on which images, method by method and seed by seed.

    python benchmarks/field.py person --seed=0 --data=DIR/coco_half --weights=DIR --workdir=runs/field
    kdjax league benchmarks/studies/*.json --out=runs/league

`scenes` needs neither --data nor --weights; `bccd` needs --data=DIR/bccd, and trains its teacher first; `person` and
`coco` need the half of COCO val2017 that holds a person (80 classes, a COCO folder) and a folder with
`rtmdet_nano_person.onnx` or `yolox_nano.onnx`. Each finished run is added to `benchmarks/studies/NAME_SEED.json`, the
study.json of the seed, at once: the same command goes on with the methods that the file lacks, on any machine. `kdjax`
does all the work.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

STUDIES = Path(__file__).parent / "studies"
# all that run on RTMDet
ALL = ("mkd,rtmdet_cwd,cwd,pkd,ssim,rm,pfi,yao,fgd,mgd,crosskd,bckd,defeat,dkd,fgfi,fitnet,fkd,gid,hinton").split(",")
FOUR = ["mkd", "rtmdet_cwd", "cwd", "pkd"]
# Photographs at 320 px, three views of each image, so that the teacher's cache serves all methods and seeds.
COCO = ("--config=distill/coco_folder", "--config.steps=800", "--config.batch_size=8", "--config.optimizer.lr=0.003",
        "--config.optimizer.warmup=80", "--config.ema.ramp=200", "--config.eval.every=0",
        "--config.checkpoint.every=400", "--config.data.views=3")  # fmt: skip
FLAGS = {
    "scenes": ("--config=quickstart", "--config.eval.every=0"),
    "bccd": ("--config=quickstart", "--config.data.source=coco_folder", "--config.data.image_size=(128,160)",
             "--config.steps=300", "--config.optimizer.lr=0.003", "--config.optimizer.warmup=40",
             "--config.data.augment.scale=(0.7,1.4)", "--config.ema.ramp=80", "--config.eval.every=0",
             "--config.checkpoint.every=300"),
    "person": (*COCO, "--config.teacher.detector=rtmdet_nano", "--config.student.detector=rtmdet_nano",
               "--config.student.options.widen=0.125"),
    "coco": (*COCO, "--config.teacher.detector=yolox_nano", "--config.student.detector=rtmdet_pico"),
}  # fmt: skip
METHODS = {"scenes": ALL, "bccd": ALL, "person": FOUR, "coco": FOUR}
WEIGHTS = {"scenes": "auto", "bccd": "published,auto", "person": "auto", "coco": "auto"}


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
    finished = methods_in(kept) if kept.exists() else set()
    for method in args.methods.split(",") if args.methods else METHODS[args.study]:
        if method in finished:
            continue
        kdjax("study", "methods", f"--methods={method}", f"--weights={WEIGHTS[args.study]}", "--seeds=1",
              f"--first={args.seed}", f"--workdir={workdir}", *flags)  # fmt: skip
        STUDIES.mkdir(exist_ok=True)
        shutil.copy(workdir / "study.json", kept)


def methods_in(kept: Path) -> set[str]:
    """The methods of which a study.json holds all runs."""
    studies = json.loads(kept.read_text())["studies"].values()
    return {
        key.split(".")[0]
        for one in studies
        if not any(row["failed"] for row in one["rows"])
        for row in one["rows"]
        for key in row["methods"]
    }


def of_inputs(args: argparse.Namespace) -> list[str]:
    """The flags that say where images and weights are; what must be made of them first is made."""
    if args.study == "scenes":
        return []
    if None in ([args.data] if args.study == "bccd" else [args.data, args.weights]):
        raise SystemExit(f"{args.study}: give --data=DIR{'' if args.study == 'bccd' else ' and --weights=DIR'}")
    if args.study == "bccd":
        return [f"--config.data.root={args.data.resolve()}", f"--config.teacher.weights={bccd_teacher(args)}"]
    cache = f"--config.teacher.cache={(args.workdir / 'caches' / args.study).resolve()}"
    if args.study == "coco":
        weights = (args.weights / "yolox_nano.onnx").resolve()
        return [f"--config.data.root={args.data.resolve()}", f"--config.teacher.weights={weights}", cache]
    weights = (args.weights / "rtmdet_nano_person.onnx").resolve()
    return [f"--config.data.root={persons(args)}", f"--config.teacher.weights={weights}", cache]


def bccd_teacher(args: argparse.Namespace) -> Path:
    """The student folder of rtmdet_micro on BCCD, which starts from the quickstart's teacher."""
    workdir = args.workdir.resolve() / "bccd_teacher"
    if not (workdir / "results.json").exists():
        kdjax("train", "--config=supervised/coco_folder:rtmdet_micro", f"--config.data.root={args.data.resolve()}",
              "--config.data.image_size=(128,160)", "--config.steps=400", "--config.batch_size=8",
              "--config.optimizer.lr=0.003", "--config.optimizer.warmup=40", "--config.data.augment.scale=(0.7,1.4)",
              "--config.ema.ramp=80", "--config.eval.every=0", "--config.student.weights=quickstart_teacher",
              f"--workdir={workdir}")  # fmt: skip
    return workdir / "student"


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
