"""`kdjax push`: a model with its card to the Hugging Face Hub, from where `hf://OWNER/NAME` loads it."""

import re
from pathlib import Path

from kdjax import remote
from kdjax.commands import arguments
from kdjax.errors import UserError, imported
from kdjax.inference import Model
from kdjax.inference.model import EXPORTED
from kdjax.report import model_card
from kdjax.weights import CONFIG, WEIGHTS

CARD = "README.md"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def run(*, model: str, repository: str, license: str, private: bool) -> int:
    """Uploads a model in one commit; the repository is made if it does not exist.

    Args:
      model: a folder of weights, see `kdjax.inference.load`.
      repository: "OWNER/NAME".
      license: for the card, as the Hub names it ("apache-2.0"); "": the card is left as it is.
      private: a repository that is made is private.

    Returns:
      Exit code 0.

    Raises:
      UserError: there is no such model, the name is none, or the Hub refuses or does not answer.
    """
    if not _NAME.fullmatch(repository):
        raise UserError(f"{repository!r} is not the name of a repository: it must be OWNER/NAME")
    hub = imported("huggingface_hub", "kdjax push", "kdjax[hub]")
    loaded = arguments.load_model(model, "MODEL_DIR")
    if not (loaded.path / WEIGHTS).is_file():
        raise UserError(f"MODEL_DIR: {model} is a checkpoint of a run: push the student/ of one that is finished")
    card = _card(loaded, license)
    sent = [hub.CommitOperationAdd(CARD, card.encode())]
    sent += [hub.CommitOperationAdd(path.name, str(path)) for path in _files(loaded.path)]
    with remote.told(f"hf://{repository}", "written"):
        api = hub.HfApi()
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.repo_info(repository).private:
            raise UserError(
                f"--private: {repository} is there already and is public: make it private on the Hub, or take another "
                "name"
            )
        api.create_commit(repository, sent, commit_message=f"Upload {loaded.detector.name} with kdjax")
    print(f"{url}: {', '.join(one.path_in_repo for one in sent)}; --model=hf://{repository} loads it")
    if "license" not in model_card.parted(card)[0]:
        print("note: its card names no licence: --license=ID writes one, as in --license=apache-2.0")
    return 0


def _files(folder: Path) -> list[Path]:
    """The weights, their config, and what was exported beside them."""
    found = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    exported = {path.name for path in found if path.suffix in EXPORTED}
    beside = {f"{name}.json" for name in exported}
    beside |= {str(Path(name).with_suffix(".bin")) for name in exported if name.endswith((".xml", ".param"))}
    return [path for path in found if path.name in {WEIGHTS, CONFIG} | exported | beside]


def _card(model: Model, license: str) -> str:
    """The card of the folder, or a short one, with the header that the Hub reads."""
    path = model.path / CARD
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{path}: the card is not UTF-8: save it as UTF-8") from None
    else:
        text = model_card.short(model.detector.name, model.class_names, model.image_size)
    return model_card.completed(text, license)
