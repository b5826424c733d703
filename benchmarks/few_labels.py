"""What images without labels are worth: a tenth of the labels of a data set, and its other images without any.

    python benchmarks/few_labels.py --data=scenes --teacher=quickstart_teacher --workdir=runs/few_scenes
    python benchmarks/few_labels.py --data=DIR/bccd --teacher=runs/bccd_teacher/student --workdir=runs/few_bccd

Five results of one small student, all evaluated on the whole validation split: `twin`, trained on the labelled tenth;
`labelled`, distilled on it; `unlabelled`, distilled on it and, beside it, on the other images; `pseudo`, trained on it
and on what `kdjax label` says about the other images, without a teacher; `nowhere`, trained on what `kdjax label` says
about all of the images (scores from 0.4 on), without any label. The commands of kdjax do all the work; what they print
is in WORKDIR.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import cv2

from kdjax import data
from kdjax.training import config as settings
from kdjax.training import provenance

EVERY = 10  # one of so many training images keeps its labels
RESULTS = ("twin", "labelled", "unlabelled", "pseudo", "nowhere")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="scenes", help="scenes (200 of them), or a COCO folder")
    parser.add_argument("--teacher", default="quickstart_teacher")
    parser.add_argument("--student", default="rtmdet_pico")
    parser.add_argument("--methods", default="mkd", metavar="A+B")
    parser.add_argument("--size", type=int, nargs=2, default=(128, 128), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("flags", nargs="*", help="further settings, as --config.methods.mkd.weight=0.2 after --")
    args = parser.parse_args()
    root = args.workdir / "data"
    if not (root / "val.json").exists():
        prepare(args.data, root)
    labelled = root / "labelled.json"
    common = (root, "--config.data.val_annotations=val.json", f"--config.data.val_images={root / 'val'}")
    label(args, "others", "pseudo", f"--labelled={root}", "--annotations=labelled.json", f"--images={root / 'train'}")
    label(args, "train", "nowhere", "--threshold=0.4")
    merge(labelled, root / "pseudo.json", root / "both.json")
    found: dict[str, list[float]] = {name: [] for name in RESULTS}
    for seed in range(args.seeds):
        distil = (f"--config.teacher.weights={args.teacher}", f"--config.seed={seed}")
        first = train(args, f"labelled{seed}", labelled, *common, *distil, methods=args.methods)
        found["twin"].append(first["twin"]["AP"])
        found["labelled"].append(first["student"]["AP"])
        further = (f"--config.data.unlabelled={root / 'others'}", "--config.twin=False")
        second = train(args, f"unlabelled{seed}", labelled, *common, *distil, *further, methods=args.methods)
        found["unlabelled"].append(second["student"]["AP"])
        for name, file in (("pseudo", "both.json"), ("nowhere", "nowhere.json")):
            third = train(args, f"{name}{seed}", root / file, *common, f"--config.seed={seed}")
            found[name].append(third["student"]["AP"])
        print(json.dumps({name: [round(100 * ap, 2) for ap in aps] for name, aps in found.items()}), flush=True)
    for name, aps in found.items():
        spread = statistics.stdev(aps) if len(aps) > 1 else 0.0
        print(f"{name}: AP {100 * statistics.mean(aps):.2f}, standard deviation {100 * spread:.2f}, {len(aps)} seeds")
    print(json.dumps({"arguments": {k: str(v) for k, v in vars(args).items()}} | found | provenance.environment()))


def prepare(source: str, root: Path) -> None:
    """Writes train/, val/ and others/ with images, and train.json, labelled.json and val.json, in COCO's layout."""
    cfg = settings.base().data
    cfg.source, cfg.scenes_train = ("scenes", 200) if source == "scenes" else ("coco_folder", 0)
    cfg.root = "" if source == "scenes" else source
    dataset = data.open_dataset(cfg)
    for role in ("train", "val"):
        split, truth = dataset.splits[role], data.ground_truth(dataset, role)
        (root / role).mkdir(parents=True, exist_ok=True)
        for image in truth["images"]:
            image["file_name"] = f"{image['id']:06d}.png"
            encoded = cv2.imencode(".png", split.image(image["id"])[..., ::-1])[1]
            (root / role / image["file_name"]).write_bytes(encoded.tobytes())
        (root / f"{role}.json").write_text(json.dumps(truth))
        if role == "train":
            kept = truth["images"][::EVERY]
            ids = {image["id"] for image in kept}
            rows = [row for row in truth["annotations"] if row["image_id"] in ids]
            (root / "labelled.json").write_text(json.dumps(truth | {"images": kept, "annotations": rows}))
            (root / "others").mkdir(exist_ok=True)
            for image in truth["images"]:
                if image["id"] not in ids:
                    shutil.copy(root / role / image["file_name"], root / "others")


def label(args: argparse.Namespace, folder: str, name: str, *chosen: str) -> None:
    """Writes what the teacher says about the images of a folder."""
    root = args.workdir / "data"
    if (root / f"{name}.json").exists():
        return
    kdjax(args, f"label_{name}", "label", f"--model={args.teacher}", f"--data={root / folder}", *chosen,
          f"--out={root / f'{name}.json'}")  # fmt: skip


def merge(labelled: Path, pseudo: Path, out: Path) -> None:
    """One json of the labelled images and of those that the teacher has labelled."""
    truth, said = (json.loads(path.read_text()) for path in (labelled, pseudo))
    ids = {category["name"]: category["id"] for category in truth["categories"]}
    names = {category["id"]: category["name"] for category in said["categories"]}
    first = 1 + max(image["id"] for image in truth["images"])
    first_row = 1 + max((row["id"] for row in truth["annotations"]), default=0)
    for image in said["images"]:
        image["id"] += first
    for row in said["annotations"]:
        row |= {"id": row["id"] + first_row, "image_id": row["image_id"] + first}
        row["category_id"] = ids[names[row["category_id"]]]
    truth["images"] += said["images"]
    truth["annotations"] += said["annotations"]
    out.write_text(json.dumps(truth))


def train(args: argparse.Namespace, name: str, labels: Path, root: Path, *flags: str, methods: str = "") -> dict:
    """The results of a run; a finished one is read."""
    workdir = args.workdir / name
    if not (workdir / "results.json").exists():
        config = f"distill/coco_folder:{methods}" if methods else f"supervised/coco_folder:{args.student}"
        sizes = (f"--config.data.root={root}", f"--config.data.image_size=({args.size[0]},{args.size[1]})")
        files = (f"--config.data.train_annotations={labels.name}", f"--config.data.train_images={root / 'train'}")
        steps = (f"--config.steps={args.steps}", f"--config.batch_size={args.batch}", "--config.eval.every=0")
        rates = (f"--config.optimizer.warmup={args.steps // 10}", f"--config.ema.ramp={args.steps // 5}")
        kdjax(args, name, "train", f"--config={config}", f"--config.student.detector={args.student}",
              "--config.optimizer.lr=0.005", "--config.data.augment.scale=(0.8,1.25)", *sizes, *files, *steps,
              *rates, *flags, *(args.flags if methods else ()), f"--workdir={workdir}")  # fmt: skip
    return json.loads((workdir / "results.json").read_text())


def kdjax(args: argparse.Namespace, name: str, *command: str) -> None:
    """Runs a command; what it prints goes to WORKDIR/NAME.log."""
    log = args.workdir / f"{name}.log"
    with log.open("w") as out:
        code = subprocess.run([sys.executable, "-m", "kdjax", *command], stdout=out, stderr=out).returncode
    if code:
        sys.exit(f"kdjax {' '.join(command)}: exit {code}; see {log}")


if __name__ == "__main__":
    main()
