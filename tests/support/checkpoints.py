"""Checkpoint files that are broken in every known way."""

import importlib.util
import os
import pickle
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file as save_safetensors

CLASSES = ["ant", "bee", "cat"]


class Code:
    """Makes a folder when it is unpickled without care."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def spoilt(folder: Path, state: dict) -> dict[str, str]:
    """Writes files that are cut off, empty, of something else or with code in a pickle: name -> words of the refusal.

    The code would make the folder `executed` beside them. Files of PyTorch are among them where it is installed.
    """
    code = {"state_dict": {**state, "code": Code(folder / "executed")}}
    np.savez(folder / "whole.npz", **state)
    save_safetensors(state, folder / "whole.safetensors")
    np.savez(folder / "objects.npz", **state, code=np.array([Code(folder / "executed")], dtype=object))
    np.savez(folder / "words.npz", **state | {"bbox_head.rtm_cls.0.bias": np.array(["a", "b", "c"])})
    np.save(folder / "one.npy", np.zeros(3))
    (folder / "one.npy").rename(folder / "one.npz")
    told = {
        "objects.npz": "code holds Python objects, and kdjax never runs code from a file",
        "words.npz": "is not an array of numbers",
        "one.npz": "it is not a file of npz, safetensors or PyTorch",
    }
    cut = "the file is damaged or cut off"
    kinds = {"npz": cut, "safetensors": cut}
    if importlib.util.find_spec("torch"):
        import torch

        tensors = {name: torch.tensor(value) for name, value in state.items()}
        torch.save(tensors, folder / "whole.pth")
        torch.save({"state_dict": tensors, "code": Code(folder / "executed")}, folder / "code.pth")
        old = dict(_use_new_zipfile_serialization=False)
        torch.save({"state_dict": tensors, "code": Code(folder / "executed")}, folder / "old.pth", **old)
        torch.save(list(tensors.values()), folder / "list.pth")
        told |= dict.fromkeys(("code.pth", "old.pth"), f"it needs {os.mkdir.__module__}.mkdir")
        told |= {"list.pth": "holds a list, not weights by name"}
        kinds["pth"] = cut
    pickled = "it cannot be loaded safely" if "pth" in kinds else "reading it needs PyTorch"
    for kind, words in kinds.items():
        whole = (folder / f"whole.{kind}").read_bytes()
        for name, content, why in (
            ("cut", whole[: len(whole) // 2], words),
            ("empty", b"", "the file is empty"),
            ("pickle", pickle.dumps(code), pickled),
        ):
            (folder / f"{name}.{kind}").write_bytes(content)
            told[f"{name}.{kind}"] = why
    return told
