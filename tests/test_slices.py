"Boxes, pieces and the index: any part of a tensor is what was written, or it is refused."

import json
import math
from itertools import product

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_edu import boxes
from megatron_edu import slices as module
from megatron_edu.boxes import INDEX, Box, key_of, pieces_of, unit_of, whole
from megatron_edu.files import MARK, written_folder
from megatron_edu.slices import Piece, Slices, join_index, write_pieces

SIZES = (1, 2, 4, 8)


def own_boxes(shape, dim, blocks, size, rank):
    "What one rank of several has of a tensor, block by block."
    if dim is None:
        return [whole(shape)]
    block = shape[dim] // blocks
    part = block // size
    return [whole(shape).along(dim, i * block + rank * part, part) for i in range(blocks)]


def stored(shape, dim, blocks, size, itemsize=4):
    "The pieces that each rank of a group has."
    found = []
    for rank in range(size):
        mine = []
        for box in own_boxes(shape, dim, blocks, size, rank):
            unit = 0 if dim is None else unit_of(box.shape[dim] * size, box.shape[dim])
            mine += pieces_of(box, dim, unit, itemsize)
        found.append(mine)
    return found


LAYOUTS = [
    ((48, 5), 0, 3), ((16, 6), 0, 1), ((6, 16), 1, 1), ((24,), 0, 3), ((5, 7), None, 1),
    ((9, 2), None, 1), ((1,), None, 1),
]


@pytest.mark.parametrize("shape, dim, blocks", LAYOUTS)
def test_pieces_cover_a_tensor_once_and_are_the_same_for_any_number_of_ranks(shape, dim, blocks):
    found = set()
    for size in SIZES if dim is not None else (1,):
        pieces = [piece for mine in stored(shape, dim, blocks, size) for piece in mine]
        covered = torch.zeros(shape)
        for piece in pieces:
            covered[piece.within()] += 1
        assert (covered == 1).all()
        found.add(frozenset(pieces))
    assert len(found) == 1


@pytest.mark.parametrize("shape, dim, blocks", LAYOUTS[:4])
@pytest.mark.parametrize("before, after", list(product(SIZES, SIZES)))
def test_a_rank_needs_whole_pieces_only(shape, dim, blocks, before, after):
    pieces = [piece for mine in stored(shape, dim, blocks, before) for piece in mine]
    for rank in range(after):
        for box in own_boxes(shape, dim, blocks, after, rank):
            common = [piece.common(box) for piece in pieces]
            assert all(part in (None, piece) for part, piece in zip(common, pieces, strict=True))
            assert sum(math.prod(part.shape) for part in common if part) == math.prod(box.shape)


def test_sizes_that_eight_does_not_divide():
    assert unit_of(48, 12) == 6 and unit_of(12, 6) == 3 and unit_of(6, 3) == 3
    assert unit_of(9, 3) == 3 and unit_of(7, 7) == 7
    assert unit_of(24, 8) == 8      # three ranks have no whole eighths


def test_a_piece_has_at_most_so_many_bytes_or_one_row(monkeypatch):
    monkeypatch.setattr(boxes, "LARGEST", 100)
    pieces = list(pieces_of(whole((10, 5)), None, 0, 4))
    assert [piece.shape for piece in pieces] == [(5, 5), (5, 5)]
    assert [piece.shape[0] for piece in pieces_of(whole((3, 50)), None, 0, 4)] == [1, 1, 1]
    columns = Box((0, 8), (10, 8))
    assert {piece.shape for piece in pieces_of(columns, 1, 4, 4)} == {(6, 4), (4, 4)}


def test_common_parts():
    a, b = Box((0, 2), (4, 4)), Box((3, 0), (5, 3))
    assert a.common(b) == b.common(a) == Box((3, 2), (1, 1))
    assert a.common(Box((4, 2), (1, 1))) is None
    assert torch.arange(8)[Box((3,), (2,)).within((1,))].tolist() == [2, 3]
    assert Box((3,), (2,)).stop() == (5,)


# ------------------------------------------------------------------------------------- files


def save(folder, writers, **tensors):
    "Write tensors, cut along their rows, by several writers."
    entries, parts = {}, []
    with written_folder(folder, "checkpoint", entries=entries) as partial:
        for rank in range(writers):
            pieces = []
            for name, full in tensors.items():
                for box in stored(full.shape, 0, 1, writers, full.element_size())[rank]:
                    pieces.append(Piece(name, tuple(full.shape), box, full[box.within()]))
            tensors_of, entries[f"model-{rank:05d}.safetensors"] = write_pieces(
                partial / f"model-{rank:05d}.safetensors", pieces
            )
            parts.append(tensors_of)
        (partial / INDEX).write_text(json.dumps(join_index(parts)))
    return folder


def read(folder, name, box, dtype=torch.float32):
    with Slices(folder) as slices:
        found = torch.full(box.shape, 77, dtype=dtype)
        slices.read_into(found, name, box)
    return found


FULL = torch.arange(48.0).view(16, 3)


@pytest.mark.parametrize("writers", SIZES)
def test_any_box_is_what_was_written(tmp_path, writers):
    folder = save(tmp_path / "saved", writers, x=FULL, y=-FULL)
    for box in (whole(FULL.shape), Box((3, 1), (9, 2)), Box((15, 0), (1, 3)), Box((4, 2), (2, 1))):
        assert torch.equal(read(folder, "x", box), FULL[box.within()])
        assert torch.equal(read(folder, "y", box), -FULL[box.within()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_types_are_kept_and_others_read_into(tmp_path, dtype):
    folder = save(tmp_path / "saved", 2, x=FULL.to(dtype))
    assert torch.equal(read(folder, "x", whole(FULL.shape), dtype), FULL.to(dtype))
    assert torch.equal(read(folder, "x", whole(FULL.shape), torch.float64), FULL.double())
    with Slices(folder) as slices:
        assert slices.entries["x"].dtype == dtype


def test_the_files_are_safetensors_files_that_others_read(tmp_path):
    folder = save(tmp_path / "saved", 2, x=FULL)
    found = load_file(folder / "model-00001.safetensors")
    assert sorted(found) == [f"x[{at}:{at + 2},0:3]" for at in (10, 12, 14, 8)]
    assert torch.equal(found["x[8:10,0:3]"], FULL[8:10])


def test_a_view_of_columns_is_written_as_it_looks(tmp_path):
    box = Box((0, 1), (16, 2))
    folder = tmp_path / "saved"
    with written_folder(folder, "checkpoint") as partial:
        pieces = [Piece("x", (16, 2), whole((16, 2)), FULL[box.within()])]
        tensors, _ = write_pieces(partial / "model-00000.safetensors", pieces)
        (partial / INDEX).write_text(json.dumps(join_index([tensors])))
    assert torch.equal(read(folder, "x", whole((16, 2))), FULL[:, 1:])


def test_only_the_pieces_that_are_needed_are_read(tmp_path, monkeypatch):
    folder, looked_at = save(tmp_path / "saved", 2, x=FULL), []
    real = module.checksum
    monkeypatch.setattr(module, "checksum", lambda v: looked_at.append(v[0, 0].item()) or real(v))
    with Slices(folder) as slices:
        for _ in range(2):      # once each, however often it is read
            slices.read_into(torch.empty(4, 3), "x", Box((4, 0), (4, 3)))
    assert looked_at == [12, 18]


def test_damage_elsewhere_is_none_of_ours(tmp_path):
    folder = save(tmp_path / "saved", 2, x=FULL)
    (folder / "model-00001.safetensors").unlink()
    assert torch.equal(read(folder, "x", Box((0, 0), (8, 3))), FULL[:8])
    with pytest.raises(ValueError, match="model-00001.safetensors is not a whole .*no such file"):
        read(folder, "x", Box((7, 0), (2, 3)))
    with Slices(folder) as slices, pytest.raises(ValueError, match="model-00001"):
        slices.check_files()


def test_a_number_that_is_none_is_refused(tmp_path):
    full = FULL.clone()
    full[9, 1] = torch.inf
    folder = save(tmp_path / "saved", 1, x=full)
    assert read(folder, "x", Box((0, 0), (9, 3))).sum() == FULL[:9].sum()
    with pytest.raises(ValueError, match="index.json: x is not finite everywhere; use another"):
        read(folder, "x", Box((9, 1), (1, 1)))


def noted(folder):
    "Give the mark the sum of the index as it is now."
    from megatron_edu import files

    files.note(folder, INDEX)


def edit(folder, change, note=True):
    content = json.loads((folder / INDEX).read_text())
    change(content)
    (folder / INDEX).write_text(json.dumps(content))
    if note:
        noted(folder)


def pieces(content):
    return content["tensors"]["x"]["pieces"]


WRONG = {
    "another format": (lambda c: c.update(format=2), "format 2; 1 is known"),
    "no tensors": (lambda c: c.pop("tensors"), "tensors"),
    "tensors in a list": (lambda c: c.update(tensors=[1]), "no index"),
    "no pieces": (lambda c: c["tensors"]["x"].update(pieces=[]), "x has no piece"),
    "a type of its own": (lambda c: c["tensors"]["x"].update(dtype="F33"), "F33"),
    "a type that is a list": (lambda c: c["tensors"]["x"].update(dtype=[]), "no index"),
    "a shape below 0": (lambda c: c["tensors"]["x"].update(shape=[16, -3]), "no list of sizes"),
    "a shape of bools": (lambda c: c["tensors"]["x"].update(shape=[16, True]), "no list of sizes"),
    "a larger shape": (lambda c: c["tensors"]["x"].update(shape=[17, 3]), "leave a gap"),
    "a smaller shape": (lambda c: c["tensors"]["x"].update(shape=[15, 3]), "not within"),
    "a flat shape": (lambda c: c["tensors"]["x"].update(shape=[48]), "another number of dims"),
    "an endless shape": (lambda c: c["tensors"]["x"].update(shape=[10**30, 3]), "leave a gap"),
    "a piece is missing": (lambda c: pieces(c).pop(), "leave a gap"),
    "a piece twice": (lambda c: pieces(c).append(pieces(c)[0]), "overlap"),
    "a piece in place of another": (
        lambda c: pieces(c).__setitem__(1, pieces(c)[0]), "overlap, or leave a gap",
    ),
    "a file above": (lambda c: pieces(c)[0].__setitem__(0, "../x-00000.safetensors"), "no file of"),
    "a file by number": (lambda c: pieces(c)[0].__setitem__(0, 0), "no file of pieces"),
    "no checksum": (lambda c: pieces(c)[0].__setitem__(3, None), "no checksum"),
    "a short checksum": (lambda c: pieces(c)[0].__setitem__(3, "00"), "no checksum"),
    "a piece of three items": (lambda c: pieces(c)[0].pop(), "no index"),
    "another place": (lambda c: pieces(c)[0].__setitem__(1, [1, 0]), "overlap, or leave a gap"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_an_index_that_is_none_is_refused(tmp_path, kind):
    folder = save(tmp_path / "saved", 2, x=FULL)
    change, message = WRONG[kind]
    edit(folder, change)
    with pytest.raises(ValueError, match=f"saved/index.json.*{message}.*use another checkpoint"):
        Slices(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "\0\0", '{"format": 1'])
def test_an_index_that_is_no_json_is_refused(tmp_path, text):
    folder = save(tmp_path / "saved", 1, x=FULL)
    (folder / INDEX).write_text(text)
    noted(folder)
    with pytest.raises(ValueError, match="saved/index.json is no index of a checkpoint"):
        Slices(folder)


def test_an_index_that_was_changed_is_refused_even_where_it_is_right(tmp_path):
    folder = save(tmp_path / "saved", 1, x=FULL)
    edit(folder, lambda content: pieces(content).reverse(), note=False)
    with pytest.raises(ValueError, match="it is not as .megatron_edu.json beside it says"):
        Slices(folder)


def test_a_folder_without_its_mark_is_refused(tmp_path):
    folder = save(tmp_path / "saved", 1, x=FULL)
    (folder / MARK).unlink()
    with pytest.raises(ValueError, match="written last, is not beside it.* copy the folder whole"):
        Slices(folder)


def test_the_index_and_the_file_disagree(tmp_path):
    folder = save(tmp_path / "saved", 1, x=FULL)
    path = folder / "model-00000.safetensors"
    content = load_file(path)
    first = key_of("x", Box((0, 0), (2, 3)))
    for changed in ({first: content[first].double()}, {first: content[first].T.contiguous()}):
        save_file(content | changed, path)
        with pytest.raises(ValueError, match=r"x\[0:2,0:3\] is not as the index says"):
            read(folder, "x", whole(FULL.shape))
    save_file({key: value for key, value in content.items() if key != first}, path)
    with Slices(folder) as slices, pytest.raises(ValueError, match="is not as the index says"):
        slices.check_files()


def test_whole_tensors_without_an_index_are_read_too(tmp_path):
    save_file({"x": FULL, "y": -FULL}, tmp_path / "model.safetensors")
    with Slices(tmp_path, "model.safetensors") as slices:
        assert slices.shapes("model") == {"x": (16, 3), "y": (16, 3)}
        assert not slices.shapes("optimizer")
        found = torch.empty(2, 2)
        slices.read_into(found, "y", Box((3, 1), (2, 2)))
        assert slices.path_of("y") == tmp_path / "model.safetensors"
    assert torch.equal(found, -FULL[3:5, 1:])
    save_file({"x": FULL.long()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="x holds numbers of type I64; weights are of F64, F32"):
        Slices(tmp_path, "model.safetensors")


def test_the_disk_is_full(tmp_path):
    with pytest.raises(OSError):
        write_pieces(tmp_path / "absent" / "x", [Piece("x", (16, 3), whole((16, 3)), FULL)])
    write_pieces(tmp_path / "there", [])
    with pytest.raises(FileExistsError):        # nothing is written over
        write_pieces(tmp_path / "there", [])
