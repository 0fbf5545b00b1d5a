"A checkpoint as older versions wrote it: whole tensors in two files, and no checksums."

from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_edu import files
from megatron_edu.boxes import INDEX, whole
from megatron_edu.resume import MODEL, OPTIMIZER, PLAIN, tensors_of


def full_tensors(folder: Path, part: str) -> dict[str, torch.Tensor]:
    "All weights (`MODEL`), or all moments (`OPTIMIZER`), of a checkpoint of any format."
    found = {}
    with tensors_of(folder) as slices:
        for name, shape in slices.shapes(part).items():
            found[name] = torch.empty(shape, dtype=slices.entries[name].dtype)
            slices.read_into(found[name], name, whole(shape))
    return found


def make_plain(folder: Path) -> Path:
    "Write a checkpoint anew, in its place, unless it is one already."
    if not (folder / INDEX).exists():
        return folder
    for part, name in zip((MODEL, OPTIMIZER), PLAIN, strict=True):
        tensors = full_tensors(folder, part)
        if tensors:
            save_file(tensors, folder / name, metadata={"format": "pt"})
    for path in [folder / INDEX, *folder.glob("*-[0-9]*.safetensors")]:
        path.unlink()
    names = [path.name for path in folder.iterdir() if path.name != files.MARK]
    files._write_mark(folder, "checkpoint", {name: files._entry(folder / name) for name in names})
    files.note(folder.parent, f"{folder.name}/{files.MARK}")
    return folder
