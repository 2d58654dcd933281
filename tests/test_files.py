import os
import struct
import unicodedata
import zlib

import numpy as np
import pytest
import torch
from conftest import write_folder
from PIL import Image

from replicate import data
from replicate.files import decode, list_classes
from replicate.records import InputError

RAMP = np.linspace(0, 1, 16 * 16).reshape(16, 16)


def deep(path, values, kind):
    Image.fromarray(values.astype(kind)).save(path)
    return decode(path)[0].float() / 255


@pytest.mark.parametrize("name,top,kind", [
    ("grey16.png", 65535, np.uint16), ("grey16.tif", 65535, np.uint16),
    ("twelve.png", 4095, np.uint16), ("twelve.tif", 4095, np.uint16),
    ("grey32.tif", 2 ** 31 - 1, np.int32), ("unit.tif", 1, np.float32),
    ("level.tif", 255, np.float32)])
def test_pictures_deeper_than_eight_bits_keep_their_levels(tmp_path, name, top, kind):
    got = deep(tmp_path / name, RAMP * top, kind)
    expected = torch.from_numpy(RAMP).float() * (
        0.5 if "32.tif" in name and kind is np.int32 else 1)
    assert (got - expected).abs().max() < 1.5 / 255


def write_tiff(path, values, white_is_zero=False):
    """A grey TIFF, little endian and not compressed, of whatever kind of numbers."""
    kind, bits = "uif".index(values.dtype.kind) + 1, 8 * values.dtype.itemsize
    tags = {256: values.shape[1], 257: values.shape[0], 258: bits, 259: 1,
            262: 0 if white_is_zero else 1, 273: 200, 277: 1, 278: values.shape[0],
            279: values.nbytes, 339: kind}
    content = b"II*\0" + struct.pack("<IH", 8, len(tags))
    content += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    path.write_bytes(content.ljust(200, b"\0") + values.tobytes())
    return path


@pytest.mark.parametrize("kind,top", [("u1", 255), ("<u2", 65535), ("<u4", 2 ** 32 - 1), ("<f4", 1),
                                      ("i1", 127), ("<i2", 32767), ("<i4", 2 ** 31 - 1)])
def test_tiffs_of_all_kinds_of_numbers_are_seen_as_they_are_meant(tmp_path, kind, top):
    values = (RAMP * top).astype(kind)
    level = 1 if kind[-2] != "i" else {"i1": 127 / 255, "<i2": 32767 / 65535, "<i4": 0.5}[kind]
    if kind in ("u1", "<u2", "<f4"):  # Pillow reads no others
        inverted = decode(write_tiff(tmp_path / "a.tif", values, white_is_zero=True))[0] / 255
        assert (inverted - (1 - torch.from_numpy(RAMP))).abs().max() < 1.5 / 255
    assert (decode(write_tiff(tmp_path / "b.tif", values))[0] / 255
            - level * torch.from_numpy(RAMP)).abs().max() < 1.5 / 255
    if kind[-2] == "i":
        with pytest.raises(InputError, match="cannot be read .it holds negative numbers"):
            decode(write_tiff(tmp_path / "c.tif", values - np.array(2, kind)))


@pytest.mark.parametrize("odd,expected", [
    (np.inf, 1.0), (np.nan, 0.0), (-np.inf, 0.0), (-1.0, "it holds negative numbers"),
    (3.4e38, "it holds numbers of up to 3.4e.38")])  # as maps mark what was not measured
def test_one_odd_number_does_not_change_the_rest_of_a_picture(tmp_path, odd, expected):
    values = RAMP.astype("<f4")
    values[3, 4] = odd
    path = write_tiff(tmp_path / "a.tif", values)
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            decode(path)
    else:
        right = torch.from_numpy(RAMP).clone()
        right[3, 4] = expected
        assert (decode(path)[0] / 255 - right).abs().max() < 1.5 / 255


def test_a_fourth_byte_that_a_bitmap_does_not_use_is_no_transparency(tmp_path):
    masks = struct.pack("<4I", 0xff0000, 0xff00, 0xff, 0xff000000)
    header = struct.pack("<IiiHHIIiiII", 108, 20, 20, 1, 32, 3, 1600, 0, 0, 0, 0) + masks
    start = b"BM" + struct.pack("<IHHI", 14 + 108 + 1600, 0, 0, 14 + 108) + header.ljust(108, b"\0")
    for alpha, seen in ((0, [30, 20, 10]), (128, [142, 137, 132])):
        (tmp_path / "a.bmp").write_bytes(start + bytes([10, 20, 30, alpha]) * 400)
        assert decode(tmp_path / "a.bmp")[:, 5, 5].tolist() == seen


def test_the_transparent_colour_of_a_deep_png_is_white(tmp_path):
    header = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + struct.pack(">3H", 200 * 257, 100, 5) * 16 for _ in range(16))
    for clear, seen in (((200 * 257, 100, 5), [255] * 3), ((200, 100, 5), [200, 0, 0])):
        path = tmp_path / f"{clear[0]}.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                         + chunk(b"tRNS", struct.pack(">3H", *clear))
                         + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
        assert decode(path)[:, 0, 0].tolist() == seen


def chunk(kind, content):
    """A chunk of a PNG."""
    return (struct.pack(">I", len(content)) + kind + content
            + struct.pack(">I", zlib.crc32(kind + content)))


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_the_transparent_level_of_a_grey_png_is_white(tmp_path, bits):
    header = struct.pack(">IIBBBBB", 16, 16, bits, 0, 0, 0, 0)  # all pixels have level 0
    for level, white in ((0, 255), (1, 0)):
        path = tmp_path / f"{level}.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                         + chunk(b"tRNS", struct.pack(">H", level))
                         + chunk(b"IDAT", zlib.compress(bytes(16 * (1 + 2 * bits))))
                         + chunk(b"IEND", b""))
        assert (decode(path) == white).all()


@pytest.mark.parametrize("link,target", [("train/cat/more", "../dog"), ("train/cat/more", "../.."),
                                         ("train/fox", "cat"), ("test/cat/0.png", "../dog/1.png"),
                                         ("test/cat/more", "../../train/cat")])
def test_a_link_puts_no_picture_into_two_places(tmp_path, link, target):
    root = write_folder(tmp_path / "set")
    write_folder(root / "own", classes=("fox",), parts=("test",))
    if "fox" in link:
        (root / "own" / "test" / "fox").rename(root / "test" / "fox")
    (root / link).unlink(missing_ok=True)
    (root / link).symlink_to(target)
    with pytest.raises(InputError, match="a link makes .* a picture of both .* and .*: remove it"):
        data.load(f"folder:{root}", tmp_path, "cpu", 16)


def test_one_file_with_two_names_is_one_picture(tmp_path):
    root = write_folder(tmp_path / "set")
    (root / "test/cat/0.png").unlink()
    (root / "test/cat/0.png").hardlink_to(root / "train/cat/1.png")
    with pytest.raises(InputError, match="a link makes .*test/cat/0.png a picture of both"):
        data.load(f"folder:{root}", tmp_path, "cpu", 16)


def test_two_forms_of_one_class_name_are_said(tmp_path, capsys):
    root = write_folder(tmp_path / "set", classes=("caf\u00e9", "cafe\u0301"))
    with pytest.raises(InputError, match="has the class caf. twice"):
        data.load(f"folder:{root}", tmp_path, "cpu", 16)
    root = write_folder(tmp_path / "lines", classes=("a\nb", "c"))
    data.load(f"folder:{root}", tmp_path, "cpu", 16)
    assert "(a\\nb 6, c 6)" in capsys.readouterr().out


def test_links_to_pictures_that_lie_elsewhere_are_a_set(tmp_path):
    root = write_folder(tmp_path / "set")
    (root / "train").rename(tmp_path / "pool")
    for path in sorted((tmp_path / "pool").glob("*/*.png")):
        link = root / "train" / path.relative_to(tmp_path / "pool")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    assert len(data.load(f"folder:{root}", tmp_path, "cpu", 16).train) == 12


def test_a_picture_is_turned_as_its_orientation_says(tmp_path):
    upright = np.zeros((20, 30, 3), np.uint8)
    upright[:10] = 255  # bright above
    for orientation, stored in ((3, upright[::-1, ::-1]), (6, np.rot90(upright)),
                                (8, np.rot90(upright, 3))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "turned.png", exif=exif)
        assert torch.equal(decode(tmp_path / "turned.png"),
                           torch.from_numpy(upright).permute(2, 0, 1))


def test_transparent_parts_lie_on_white(tmp_path):
    for name, mode in (("a.png", "RGBA"), ("b.png", "LA")):
        picture = Image.new(mode, (16, 16), 0)  # black, wholly transparent
        picture.save(tmp_path / name)
        assert (decode(tmp_path / name) == 255).all()
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([10, 20, 30] * 256)
    palette.save(tmp_path / "c.png", transparency=0)
    assert (decode(tmp_path / "c.png") == 255).all()
    half = Image.new("RGBA", (16, 16), (0, 0, 0, 128))
    half.save(tmp_path / "d.webp", lossless=True)
    assert (decode(tmp_path / "d.webp").float() - 127).abs().max() <= 1


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>",
                                     b"\x89PNG\r\n\x1a\n" + b"\0" * 40, b"GIF89a\1\0"])
def test_a_file_that_is_no_picture_gets_one_line(tmp_path, content):
    (tmp_path / "odd \U0001f408.png").write_bytes(content)
    with pytest.raises(InputError, match="cannot be read .*: mend or remove it"):
        decode(tmp_path / "odd \U0001f408.png")


def test_whatever_a_plugin_raises_is_one_line(tmp_path, monkeypatch):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    for error in (RuntimeError("no image item"), KeyError(3), TypeError(),
                  NotImplementedError("rare\nkind")):
        monkeypatch.setattr(Image.Image, "convert",
                            lambda *_, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(InputError, match="a.png cannot be read") as caught:
            decode(tmp_path / "a.png")
        assert "\n" not in str(caught.value)


def test_names_of_classes_are_composed_and_sorted_alike(tmp_path):
    for folder in (tmp_path / "of a disk", tmp_path / "of a mac"):
        kind = "NFD" if folder.name == "of a mac" else "NFC"
        names = [unicodedata.normalize(kind, name) for name in ("\u00e9clair", "fig")]
        write_folder(folder, classes=names, parts=("train",))
    (_, first, ours), (_, second, theirs) = (
        list_classes(tmp_path / name / "train") for name in ("of a disk", "of a mac"))
    assert ours == theirs == ["fig", "\u00e9clair"] and first == second


def test_a_gigantic_picture_gets_one_line(tmp_path):
    Image.new("1", (20000, 10000)).save(tmp_path / "large.png")
    with pytest.raises(InputError, match="large.png cannot be read"):
        decode(tmp_path / "large.png", 32)


def closed(folder, scandir):
    def scan(path):
        if str(path) == str(folder):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    return scan


def test_a_listing_says_what_it_took_and_what_it_left_out(tmp_path, capsys, monkeypatch):
    root = write_folder(tmp_path, parts=("train",)) / "train"
    Image.new("RGB", (20, 20)).save(root / "cat" / "more.jfif", "JPEG")
    for name in (".DS_Store", ".hidden.png", "notes.txt", "raw.heic"):
        (root / "cat" / name).write_bytes(b"x")
    (root / "dog" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(root / "dog" / "pipe.png")
    (root / "loose.png").write_bytes(b"x")
    (root / "dog" / "again").symlink_to(root / "dog")  # a loop
    for folder in ("@eaDir", ".thumbnails"):
        (root / folder).mkdir()
        (root / "cat" / folder).mkdir()
        (root / "cat" / folder / "small.png").write_bytes(b"x")
    paths, labels, classes = list_classes(root)
    assert classes == ["cat", "dog"] and labels == [0] * 7 + [1] * 6 and paths == sorted(paths)
    printed = capsys.readouterr().out
    monkeypatch.setattr(os, "scandir", closed(root / "cat", os.scandir))
    with pytest.raises(InputError, match="left out 1 folder that cannot be opened"):
        list_classes(root)
    for part in ("13 pictures (cat 7, dog 6)", "6 hidden", "1 .heic", "1 not a file",
                 "1 not in a class's folder", "1 .txt", "1 dangling link", "1 folder seen before"):
        assert part in printed


def test_streamed_batches_need_no_shared_memory_and_end_with_the_consumer(tmp_path):
    root = write_folder(tmp_path)
    resident = data.load(f"folder:{root}", tmp_path, "cpu", 16, streamed=False).train
    streamed = data.load(f"folder:{root}", tmp_path, "cpu", 16, streamed=True).train

    def order():
        while True:  # as endless as training's
            yield torch.tensor([3, 0, 9])

    batches = streamed.batches(order())
    for _ in range(3):
        images, labels = next(batches)
        assert torch.equal(images, resident.images[[3, 0, 9]]) and labels.tolist() == [0, 0, 1]
    batches.close()
    (root / "train" / "cat" / "3.png").write_bytes(b"rubbish")
    with pytest.raises(InputError, match="3.png cannot be read"):
        list(streamed.batches([torch.tensor([3])]))


@pytest.mark.parametrize("content", [b"", b"BZh91AY&SY cut", b"<html>404</html>"])
def test_damaged_raw_files_are_set_aside_and_fetched_again(tmp_path, capsys, monkeypatch, content):
    (tmp_path / "usps.bz2").write_bytes(content)
    fetched = []
    torchvision = data._torchvision

    def fetch(name, root, download):
        if not download:
            return torchvision(name, root, download)
        fetched.append(name)
        raise OSError("no network")

    monkeypatch.setattr(data, "_torchvision", fetch)
    with pytest.raises(InputError, match="usps.* cannot be downloaded .no network"):
        data.load("usps", tmp_path, "cpu")
    assert fetched == ["usps"] and (tmp_path / "usps.bz2.damaged").read_bytes() == content
    assert "set aside as usps.bz2.damaged" in capsys.readouterr().out


def test_raw_files_with_impossible_labels_are_set_aside(tmp_path, capsys, monkeypatch):
    (tmp_path / "usps.bz2").write_bytes(b"x")
    images, labels = np.zeros((7291, 16, 16, 1), np.uint8), np.arange(7291) % 10
    arrays = [images, labels + 190 * (labels == 3), images[:2007], labels[:2007]]
    monkeypatch.setattr(data, "_torchvision", lambda *_, **__: arrays)
    with pytest.raises(InputError, match="usps.* labels 0..193; expected 0..9"):
        data.load("usps", tmp_path, "cpu")
    assert "set aside as usps.bz2.damaged" in capsys.readouterr().out


def test_short_idx_files_are_set_aside_and_unpacked_again(tmp_path, capsys, monkeypatch):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (raw / f"{part}-{kind}-ubyte").write_bytes(b"\0\0\10\3\0\0")
    (raw / "train-images-idx3-ubyte.gz").write_bytes(b"an archive")
    monkeypatch.setattr(data, "_download", lambda *_: pytest.skip("fetched again, as it should"))
    try:
        data.load("mnist", tmp_path, "cpu")
    finally:
        assert sorted(path.suffix for path in raw.iterdir()) == [".damaged"] * 4 + [".gz"]


def test_part_of_imagenette_is_not_taken_for_the_whole(tmp_path):
    write_folder(tmp_path / "imagenette2-160", parts=("train", "val"))
    with pytest.raises(InputError, match="12 and 8 pictures where imagenette has 9469 and 3925"):
        data.load("imagenette", tmp_path, "cpu")
