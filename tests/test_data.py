"""dtrak_jax.data: choices are functions of ids, pixels are those of the files."""

import functools
import hashlib
import json
import os
import shutil
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import png
from PIL import Image
from sklearn.datasets import load_digits

from dtrak_jax import files
from dtrak_jax.checks import check_ids, check_images
from dtrak_jax.config import DataConfig
from dtrak_jax.data import (
    Dataset,
    choose,
    from_pixels,
    load,
    load_queries,
    plain_pictures,
    remarks,
    remarks_on_groups,
    subset_mask,
    to_pixels,
)
from dtrak_jax.data import preprocess as prepare_picture
from dtrak_jax.data.corrections import corrections
from dtrak_jax.data.folder import pictures
from dtrak_jax.data.hands import CONTRAST, GREY, HANDS, hands

IDS = [f"example-{i}" for i in range(1000)]
LABELS = np.arange(1000) % 10
UNEQUAL = np.repeat(np.arange(101), [900] + [1] * 100)


def noise(*shape, seed=0):
    """Random uint8 pixels."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def scaled(pixels):
    """uint8 [H, W, C] as a model sees it."""
    return pixels.astype(np.float32) / 127.5 - 1


def preprocess(*arguments, **options):
    """The pixels of an image as a model sees it."""
    return prepare_picture(*arguments, **options).pixels


# Choices


@pytest.mark.parametrize("labels", [None, LABELS, UNEQUAL], ids=["no", "ten", "101"])
def test_choice_ignores_the_order_of_the_examples(labels):
    order = np.random.default_rng(0).permutation(1000)
    chosen = choose(IDS, labels, 321, seed=3, stream="s")
    shuffled = choose(
        np.array(IDS)[order], None if labels is None else labels[order], 321, 3, "s"
    )
    assert len(set(chosen)) == 321 and list(chosen) == sorted(chosen)
    assert set(order[shuffled]) == set(chosen)


@pytest.mark.parametrize("labels", [LABELS, UNEQUAL, np.sqrt(np.arange(1000)) // 1])
@pytest.mark.parametrize("count", [0, 1, 7, 55, 500, 550, 993, 1000])
def test_every_label_gets_its_share_to_within_one(labels, count):
    chosen = choose(IDS, labels, count, seed=0, stream="s")
    assert len(chosen) == count
    have = Counter(labels[chosen])
    for label, size in Counter(labels).items():
        assert abs(have[label] - count * size / 1000) < 1


def test_choice_never_changes():
    ids, labels = list("abcdefgh"), list("xxxxxyyy")
    assert choose(ids, None, 3, seed=0, stream="train").tolist() == GOLDEN[0]
    assert choose(ids, labels, 4, seed=1, stream="train").tolist() == GOLDEN[1]
    assert np.flatnonzero(subset_mask(ids, labels, 0, 5)).tolist() == GOLDEN[2]


GOLDEN = [1, 4, 5], [0, 1, 2, 5], [2, 3, 4, 7]


def test_a_choice_may_be_of_nothing_but_not_of_twins():
    with pytest.raises(ValueError, match="'b' occurs more than once"):
        choose(["a", "b", "b"], None, 1, 0, "s")
    assert choose([], None, 0, 0, "s").shape == (0,)


def test_members_are_independent_halves():
    masks = np.array([subset_mask(IDS, LABELS, 0, member) for member in range(40)])
    assert masks.dtype == bool and (masks.sum(1) == 500).all()
    overlaps = (masks.astype(int) @ masks.T)[np.triu_indices(40, 1)]
    # Ten hypergeometric draws of 50 out of 100, of which 50 are marked.
    variance = 10 * 50 * 0.25 * 50 / 99
    assert abs(overlaps.mean() - 250) < 4 * np.sqrt(variance / len(overlaps))
    assert 0.8 < overlaps.var() / variance < 1.2
    # Each example is in Binomial(40, 1/2) of them: chi-square with about 990 degrees.
    statistic = ((masks.sum(0) - 20) ** 2 / 10).sum()
    assert abs(statistic - 990) < 4 * np.sqrt(2 * 990)


def test_seeds_and_streams_are_independent():
    halves = np.array(
        [subset_mask(IDS, LABELS, seed, 0) for seed in range(5)]
        + [np.isin(np.arange(1000), choose(IDS, LABELS, 500, 0, "train"))]
    )
    overlaps = (halves.astype(int) @ halves.T)[np.triu_indices(6, 1)]
    assert (abs(overlaps - 250) < 4 * np.sqrt(63)).all()


def test_labels_of_one_example_are_in_about_half_of_the_subsets():
    masks = np.array([subset_mask(IDS, UNEQUAL, 0, member) for member in range(60)])
    rate = masks[:, 900:].mean(0)
    assert abs(rate.mean() - 0.5) < 0.02 and (abs(rate - 0.5) < 0.3).all()


# Checks


def test_images_are_checked():
    good = np.zeros((3, 4, 4, 1), np.float32)
    check_images(good)
    bad = good.copy()
    bad[2, 0, 0, 0] = np.nan
    infinite = good.copy()
    infinite[1, 3, 3, 0] = np.inf
    for images, message in (
        (good[0], r"shape \(4, 4, 1\); they must be \[n, height, width, channels\]"),
        (good[:0], "there are none"),
        (
            good.astype(np.uint8),
            "uint8; they must be float32 .*divide by 127.5 and subtract 1",
        ),
        (good.astype(bool), "bool; they must be float32"),
        (bad, "1 of 3 images .* not finite; the first one has index 2"),
        (infinite, "1 of 3 images .* not finite; the first one has index 1"),
        (good + 255, "between 255 and 255; they must be in .* divide by 127.5"),
        (good - 1.01, "between -1.01 and -1.01"),
    ):
        with pytest.raises(ValueError, match=message):
            check_images(images)


def test_ids_are_checked():
    check_ids(["a", "b"], 2)
    check_ids(np.array(["a", "b"]), 2)
    with pytest.raises(ValueError, match="there are 2 ids for 3 examples"):
        check_ids(["a", "b"], 3)
    with pytest.raises(ValueError, match="the id 'a' occurs more than once"):
        check_ids(np.array(["a", "b", "a"]), 3)
    with pytest.raises(TypeError, match=r"ids\[1\] is 7; ids must be strings"):
        check_ids(["a", 7], 2)


# Preprocessing

RAMP = np.tile(np.array([0, 70, 140, 210], np.uint8), (4, 1))


def test_resizing_is_bilinear_with_antialiasing():
    # A triangle of radius 2 around output pixels at 1 and 3: weights 3, 3, 1 of 7.
    expected = scaled(np.tile(np.array([50, 160]), (2, 1)))[..., None]
    np.testing.assert_array_equal(preprocess(Image.fromarray(RAMP), 2, 1), expected)
    upright = preprocess(Image.fromarray(RAMP.T.copy()), 2, 1)
    np.testing.assert_array_equal(upright, expected.transpose(1, 0, 2))


def test_the_centre_is_cut_before_resizing():
    framed = np.pad(RAMP, 1, constant_values=255)
    np.testing.assert_array_equal(
        preprocess(Image.fromarray(framed), 2, 1, center_crop=4),
        preprocess(Image.fromarray(RAMP), 2, 1),
    )
    # CelebA: of 178x218 pixels, columns 19 to 158 and rows 39 to 178.
    pixels = noise(218, 178, 3)
    np.testing.assert_array_equal(
        preprocess(Image.fromarray(pixels), 140, 3, center_crop=140),
        scaled(pixels[39:179, 19:159]),
    )
    with pytest.raises(ValueError, match="4x4 pixels, fewer than data.center_crop=5"):
        preprocess(Image.fromarray(RAMP), 2, 1, center_crop=5)


@pytest.mark.parametrize(("side", "start"), [(5, 0), (6, 1), (7, 2), (9, 2), (11, 4)])
def test_crops_start_at_half_the_rest_rounded_to_even(side, start):
    wide = noise(4, side, 3)
    expected = scaled(wide[:, start : start + 4])
    np.testing.assert_array_equal(preprocess(Image.fromarray(wide), 4, 3), expected)
    tall = Image.fromarray(wide.transpose(1, 0, 2).copy())
    np.testing.assert_array_equal(preprocess(tall, 4, 3), expected.transpose(1, 0, 2))


@pytest.mark.parametrize(
    ("width", "height", "sides"), [(8, 5, (4, 3)), (5, 8, (3, 4)), (10, 3, (10, 3))]
)
def test_the_shorter_side_is_resized_and_the_longer_one_rounded_down(
    width, height, sides
):
    image = Image.fromarray(noise(height, width))
    left, top = (round((side - 3) / 2) for side in sides)
    resized = np.asarray(image.resize(sides, Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(
        preprocess(image, 3, 1)[..., 0], scaled(resized[top : top + 3, left : left + 3])
    )


def test_modes_become_grey_or_colour():
    colour = noise(6, 6, 3)
    image = Image.fromarray(colour)
    luma = np.asarray(image.convert("L"))[..., None]
    np.testing.assert_allclose(luma[..., 0], colour @ [0.299, 0.587, 0.114], atol=1)
    np.testing.assert_array_equal(preprocess(image, 6, 1), scaled(luma))
    grey = Image.fromarray(luma[..., 0])
    np.testing.assert_array_equal(
        preprocess(grey, 6, 3), scaled(np.repeat(luma, 3, axis=2))
    )
    opaque = image.convert("RGBA")
    np.testing.assert_array_equal(preprocess(opaque, 6, 3), scaled(colour))
    np.testing.assert_array_equal(preprocess(opaque, 6, 1), scaled(luma))
    palette = image.quantize(36)
    np.testing.assert_array_equal(
        preprocess(palette, 6, 3), scaled(np.asarray(palette.convert("RGB")))
    )
    deep = Image.fromarray(colour[..., 0].astype(np.uint16) * 257)
    np.testing.assert_allclose(preprocess(deep, 6, 1), scaled(colour[..., :1]), 0, 1e-6)
    with pytest.raises(ValueError, match="has pixels of 32 bits"):
        preprocess(Image.fromarray(np.full((6, 6), 40_000, np.int32)), 6, 1)
    with pytest.raises(ValueError, match="channels is 2; images have 1 .* or 3"):
        preprocess(image, 6, 2)


def test_float_images_keep_their_scale():
    pixels = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)
    image = Image.fromarray(pixels)
    np.testing.assert_array_equal(preprocess(image, 8, 1)[..., 0], pixels)
    np.testing.assert_array_equal(
        preprocess(image, 8, 3), np.repeat(pixels[..., None], 3, axis=2)
    )
    larger = preprocess(image, 16, 1)
    assert larger.shape == (16, 16, 1)
    check_images(larger[None])


# Digits


def test_digits_end_to_end():
    config = DataConfig(train=1000, validation=200, seed=1)
    splits = load(config, 8, 1)
    train, validation = splits.train, splits.validation
    assert train.images.shape == (1000, 8, 8, 1) and train.images.dtype == np.float32
    assert validation.images.shape == (200, 8, 8, 1)
    check_images(train.images)
    check_ids([*train.ids, *validation.ids], 1200)
    assert train.label_names == tuple("0123456789") and train.captions is None
    data = load_digits()
    for part in (train, validation):
        index = [int(name.removeprefix("digit-")) for name in part.ids]
        assert index == sorted(index)
        np.testing.assert_array_equal(part.images[..., 0], data.images[index] / 8 - 1)
        np.testing.assert_array_equal(part.labels, data.target[index])
        share = np.bincount(data.target) * len(part.ids) / len(data.target)
        assert (abs(np.bincount(part.labels) - share) < 2).all()

    again = load(config, 8, 1)
    np.testing.assert_array_equal(again.train.ids, train.ids)
    other = load(DataConfig(train=1000, validation=200, seed=2), 8, 1)
    assert 400 < len(set(other.train.ids) & set(train.ids)) < 700


def test_hands_draw_digits_in_their_own_style():
    """A caption names digit and contributor, whose colours the picture has."""
    config = DataConfig(
        source="hands", groups=("contributor",), train=300, validation=60
    )
    train, validation = load(config, 16, 3)
    assert not set(train.ids) & set(validation.ids)
    digits, words = load_digits(), train.label_names
    for i, name in enumerate(train.groups["contributor"]):
        index = int(train.ids[i].removeprefix("digit-"))
        word = words[digits.target[index]]
        assert train.captions[i] == f"the digit {word} by {name}"
        pixels = to_pixels(train.images[i]).astype(int)
        for colour in (HANDS[name].ink, HANDS[name].ground):
            assert abs(pixels - colour).max(axis=2).min() < 50
    counts = Counter(train.groups["contributor"])
    assert set(counts) == set(HANDS) and min(counts.values()) > 40
    with pytest.raises(ValueError, match="data.groups is .* one column, 'contributor'"):
        DataConfig(source="hands", groups=("artist",))


def test_plain_pictures_are_of_nobody():
    """They are of other digits than those by hands, and their ink is seen."""
    prepare = functools.partial(prepare_picture, size=16, channels=3)
    plain, by_hand = plain_pictures(prepare, 1000), hands(prepare)
    words = np.array(plain.label_names)[plain.labels]
    assert plain.captions.tolist() == [f"the digit {word}" for word in words]
    assert len(set(plain.ids)) == len(set(plain.digests)) == 1000
    np.testing.assert_array_equal(plain.labels[:101], plain.labels[899:])
    assert len(by_hand) == 898 and len(set(by_hand.ids)) == 898
    grey = plain.images @ GREY * 127.5
    assert (np.ptp(grey, axis=(1, 2)) > 0.5 * CONTRAST).all()
    again = plain_pictures(prepare, 3)
    np.testing.assert_array_equal(again.images, plain.images[:3])


def test_the_number_of_validation_images_does_not_change_the_training_images():
    without = load(DataConfig(train=100, validation=0), 8, 1)
    with_some = load(DataConfig(train=100, validation=30), 8, 1)
    np.testing.assert_array_equal(without.train.images, with_some.train.images)
    assert len(without.validation.images) == 0
    assert without.validation.ids.shape == without.validation.labels.shape == (0,)


def test_a_corrected_label_chooses_no_other_images(gallery):
    """Unless the source has other ids: then every label has its share again."""
    folder, names = gallery[0] / "many", [f"{i:02d}.png" for i in range(20)]
    for i, name in enumerate(names):
        (folder).mkdir(exist_ok=True)
        (folder / name).write_bytes(png(noise(8, 8, 1, seed=i)[..., 0]))

    def choose_from(labels, saved=None):
        lines = [f"{name},{label}" for name, label in zip(names, labels)]
        (folder / "list.csv").write_text("\n".join(["file,label", *lines]))
        how = {"csv": "list.csv", "train": 10, "validation": 4}
        config = DataConfig(source="folder", name=str(folder), **how)
        return load(config, 8, 1, saved)

    first = choose_from("ab" * 10)
    corrected, saved = "b" * 9 + "a" * 11, first.columns()
    assert set(choose_from(corrected).train.ids) != set(first.train.ids)
    again = choose_from(corrected, saved)
    for now, before in zip(again, first, strict=True):
        np.testing.assert_array_equal(now.ids, before.ids)
    assert again.train.label_names[again.train.labels[0]] in "ab"
    again.recorded_in(saved)
    names.pop(3 if "03.png" not in first.train.ids else 4)
    other = choose_from(corrected, saved)
    np.testing.assert_array_equal(other.train.ids, choose_from(corrected).train.ids)


def test_labels_are_kept_by_name_or_number():
    splits = load(DataConfig(labels=("3", "8"), train=200, validation=100), 8, 1)
    assert set(splits.train.labels) == set(splits.validation.labels) == {3, 8}
    assert splits.train.label_names == tuple("0123456789")
    with pytest.raises(ValueError, match="data.labels has 'three'; .* 0, 1, .* 9\\."):
        load(DataConfig(labels=("three",), train=2), 8, 1)
    with pytest.raises(ValueError, match="data.labels has '10'"):
        load(DataConfig(labels=("10",), train=2), 8, 1)


def test_too_few_examples():
    with pytest.raises(ValueError, match="data.train is 1798, .* only 1797 examples"):
        load(DataConfig(train=1798), 8, 1)
    with pytest.raises(ValueError, match="data.validation is 98, .* only 97 .* not tr"):
        load(DataConfig(train=1700, validation=98), 8, 1)
    with pytest.raises(ValueError, match=r"only 183 examples with data.labels=\('3',"):
        load(DataConfig(labels=("3",), train=184), 8, 1)


# Folders


@pytest.fixture
def gallery(tmp_path):
    """A folder with images of several kinds, and the RGB pixels of the lossless."""
    pixels = {
        "a/grey.png": noise(9, 12, seed=1),
        "a/wide.PNG": noise(8, 13, 3, seed=2),
        "b.png": noise(8, 8, 4, seed=3),
        "tall.png": noise(15, 8, 3, seed=4),
    }
    (tmp_path / "a").mkdir()
    for name, array in pixels.items():
        (tmp_path / name).write_bytes(png(array))
    Image.fromarray(noise(20, 16, 3, seed=5)).save(tmp_path / "photo.jpeg")
    Image.fromarray(noise(8, 8, 3, seed=6)).quantize(9).save(tmp_path / "palette.png")
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden.png").write_text("not an image either")
    return tmp_path, pixels


def from_folder(path, channels=3, train=1, validation=0, **settings):
    """The training images of a folder at size 8."""
    config = DataConfig(
        source="folder", name=str(path), train=train, validation=validation, **settings
    )
    return load(config, 8, channels).train


def test_a_folder_is_read_by_relative_path(gallery):
    path, pixels = gallery
    data = from_folder(path, train=6)
    assert data.ids.tolist() == [
        "a/grey.png",
        "a/wide.PNG",
        "b.png",
        "palette.png",
        "photo.jpeg",
        "tall.png",
    ]
    assert data.labels is None and data.captions is None and data.label_names == ()
    np.testing.assert_array_equal(data.images[1], scaled(pixels["a/wide.PNG"][:, 2:10]))
    laid = preprocess(Image.fromarray(pixels["b.png"]), 8, 3)
    np.testing.assert_array_equal(data.images[2], laid)
    np.testing.assert_array_equal(data.images[5], scaled(pixels["tall.png"][4:12]))
    with Image.open(path / "photo.jpeg") as image:
        np.testing.assert_array_equal(data.images[4], preprocess(image, 8, 3))
    assert from_folder(path, channels=1, train=6).images.shape == (6, 8, 8, 1)


@pytest.mark.parametrize("content", [b"GIF? no", png(noise(40, 40, 3))[:100]])
def test_ids_are_known_without_decoding(gallery, content):
    """Not even a damaged image is noticed; its pixels are an error at every use."""
    path, _ = gallery
    (path / "b.png").write_bytes(content)
    data = from_folder(path, train=6)
    assert len(data) == len(data.ids) == 6
    for _ in range(2):
        with pytest.raises(ValueError, match="b.png: it is not a readable image"):
            data.images  # noqa: B018


def test_linked_folders_are_read(gallery, tmp_path_factory):
    path, _ = gallery
    store = tmp_path_factory.mktemp("store")
    (store / "cat.png").write_bytes(png(noise(8, 8)))
    (path / "cats").symlink_to(store)
    assert "cats/cat.png" in from_folder(path, train=7).ids
    (store / "loop").symlink_to(path)
    with pytest.raises(ValueError, match="The link .*loop leads to a folder that it"):
        from_folder(path)
    (store / "loop").unlink()
    (path / "dogs").symlink_to(store / "nothing")
    with pytest.raises(ValueError, match="The link .*dogs leads nowhere; mend it"):
        from_folder(path)


def test_a_file_name_that_is_not_utf8_is_refused(gallery):
    path, _ = gallery
    name = os.fsencode(path) + b"/caf\xe9.png"
    try:
        shutil.copy(path / "b.png", name)
    except OSError:
        pytest.skip("this disk has no such names")
    with pytest.raises(ValueError, match=r"the name 'caf\\udce9.png' is not UTF-8"):
        from_folder(path)


def test_exif_orientation_is_respected(tmp_path):
    pixels = noise(8, 8, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    (tmp_path / "turned.png").write_bytes(png(pixels, exif=exif))
    data = from_folder(tmp_path)
    np.testing.assert_array_equal(data.images[0], scaled(np.rot90(pixels, -1)))


def test_a_csv_gives_labels_and_captions(gallery):
    path, _ = gallery
    (path / "list.csv").write_bytes(
        "\ufefffile,artist,label,caption\n"
        "tall.png,x,ukiyo_e,an ukiyo e painting\n"
        './b.png,y,baroque,"a painting, baroque"\n'
        "a/grey.png,z,ukiyo_e,ein Gemälde\n".encode()
    )
    data = from_folder(path, train=3, csv="list.csv")
    assert data.ids.tolist() == ["a/grey.png", "b.png", "tall.png"]
    assert data.label_names == ("baroque", "ukiyo_e")
    assert data.labels.tolist() == [1, 0, 1]
    captions = ["ein Gemälde", "a painting, baroque", "an ukiyo e painting"]
    assert data.captions.tolist() == captions
    notes = pictures(path, None, "list.csv").notes
    assert notes[0] == f"{path}/list.csv: columns that are not read: 'artist'."
    only = from_folder(path, train=2, csv="list.csv", labels=("ukiyo_e",))
    assert only.ids.tolist() == ["a/grey.png", "tall.png"]
    assert only.captions.tolist() == captions[::2]

    (path / "labels.csv").write_text("label,file\nx,b.png\n")
    assert from_folder(path, csv="labels.csv").captions is None
    (path / "captions.csv").write_text("caption,file\nx,b.png\n")
    assert from_folder(path, csv="captions.csv").labels is None
    (path / "captions.csv").write_text("caption,file,lable,\nx,b.png,y,0\n")
    (note,) = (n for n in pictures(path, None, "captions.csv").notes if "read" in n)
    assert note.endswith("not read: 'lable' (did you mean label?), ''.")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"has the columns \(none\); it must have file, and label or caption, ea"),
        ("file,artist\nb.png,x\n", "has the columns file, artist; it must have"),
        (
            "file,lable\nb.png,x\n",
            r"each once. Should the column lable be called label\?$",
        ),
        ("name,label\nb.png,x\n", "has the columns name, label; it must have"),
        ("file,label\n", "lists no files"),
        ("file,label\nb.png,x\nno.png,x\n", "line 3: there is no file .*no.png"),
        ("file,label\nb.png,x\n./b.png,y\n", "line 3: b.png is listed twice"),
        ("file,label\nb.png, \n", "line 2: `label` is empty"),
        ("file,label,caption\nb.png,x\n", "line 2: `caption` is empty"),
        ("file,label\n,x\n", "line 2: `file` is empty"),
        ("file,caption\nb.png,a, b\n", "line 2: more cells than the header"),
        ('file,label\nb.png,"x\ntall.png,y\n', "line 2: .* is a quote not closed"),
        ('file,label\nb.png,"x"y\n', "line 2: .* is a quote not closed"),
        ('file,label\nb.png,"x\ntall.png,"\n', "line 3: `label` .* from 'x' on; is a "),
        ('file,label,n\nb.png,x,"\ntall.png,y,z"\n', "line 3: `n` goes over several"),
        ('file,label\nb.png,"\ntall.png,y"\n', "line 3: `label` goes over several"),
        ("file,label\nb.png,x\n../b.png,x\n", "line 3: there is no file .*b.png"),
        ("file,label\n/dev/../etc/passwd,x\n", "line 2: the file .* is not in the fol"),
        ("sep=;\nfile;label\n\nb.png;\n", "line 4: `label` is empty"),
        ("file,label,label\nb.png,x,y\n", "label, label; it must have .* each once"),
        (f"file,label\nb.png,{'x' * 200_000}\n", "line 2: field larger than"),
        ("file,label\na,x\n", "line 2: there is no file .*/a\\."),
        ("file,label\nb.png\0,x\n", "line 2: there is no file"),
    ],
)
def test_a_wrong_csv_is_refused(gallery, text, message):
    path, _ = gallery
    (path / "list.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        from_folder(path, csv="list.csv")


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbf\r\nfile;label;more\r\na\\grey.png;x, y;\r\n\r\n;;\r\nb.png;z;\r\n",
        b"sep=;\nfile;label\n./a/../a/grey.png;x, y\nFOLDER/b.png;z",
        "file\tlabel\na/grey.png\tx, y\nb.png\tz\n".encode("utf-16"),
        b'label,file\r"x, y", a/grey.png \r z,b.png\r',
        b'file, label, n\na/grey.png, "x, y", "two\nlines"\nLINK/b.png, z,\n',
    ],
)
def test_a_csv_of_other_programs_says_the_same(gallery, tmp_path_factory, text):
    path, _ = gallery
    link = tmp_path_factory.mktemp("links") / "link"
    link.symlink_to(path)
    text = text.replace(b"FOLDER", os.fsencode(path)).replace(
        b"LINK", os.fsencode(link)
    )
    (path / "list.csv").write_bytes(text)
    for folder in (path, link):
        data = from_folder(folder, train=2, csv="list.csv")
        assert data.ids.tolist() == ["a/grey.png", "b.png"]
        assert [data.label_names[label] for label in data.labels] == ["x, y", "z"]


def test_a_csv_may_spell_accents_in_either_way_or_list_files_alone(gallery):
    path, _ = gallery
    shutil.copy(path / "b.png", path / unicodedata.normalize("NFD", "é.png"))
    (path / "list.csv").write_text("file\né.png\n", encoding="utf-8")
    data = from_folder(path, csv="list.csv")
    assert len(data.images) == 1 and data.labels is None
    assert data.notes == (
        f"{path}: left out what list.csv does not list (pictures: 4).",
    )


def test_names_of_subfolders_are_labels(tmp_path):
    """But not if a picture is elsewhere, or a CSV is named."""
    for name in ("cats/b.png", "cats/a.png", "dogs/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(noise(8, 8)))
    (tmp_path / "cats/list.csv").write_text("file,caption\na.png,a cat\n")
    data = from_folder(tmp_path, train=3)
    assert data.ids.tolist() == ["cats/a.png", "cats/b.png", "dogs/c.png"]
    assert data.label_names == ("cats", "dogs") and data.labels.tolist() == [0, 0, 1]
    assert data.notes == (
        f"{tmp_path}: labels are the names of its subfolders: cats (2), dogs (1).",
        f"{tmp_path}: left out what is no picture (1 .csv).",
    )
    assert from_folder(tmp_path, labels=("dogs",)).ids.tolist() == ["dogs/c.png"]
    assert from_folder(tmp_path / "cats", csv="list.csv").labels is None
    (tmp_path / "cats/more").mkdir()
    shutil.copy(tmp_path / "cats/a.png", tmp_path / "cats/more")
    assert from_folder(tmp_path).labels is None


def test_labels_named_by_numbers_have_no_other_numbers(gallery):
    path, _ = gallery
    (path / "list.csv").write_text("file,label\nb.png,2\ntall.png,3\n")
    three = from_folder(path, csv="list.csv", labels=("3",))
    assert three.ids.tolist() == ["tall.png"]
    with pytest.raises(ValueError, match="data.labels has '1'; .* one of: 2, 3."):
        from_folder(path, csv="list.csv", labels=("1",))
    (path / "list.csv").write_text("file,label\nb.png,two\ntall.png,three\n")
    with pytest.raises(ValueError, match="data.labels has '1'; .* one of: three, two."):
        from_folder(path, csv="list.csv", labels=("1",))


def test_columns_of_a_csv_are_groups(gallery):
    path, _ = gallery
    (path / "list.csv").write_text(
        "file, artist ,licence,label\n"
        "tall.png, Ä. ,CC-BY,x\n"
        "b.png,B,CC0,y\n"
        'a/grey.png,"C, d",CC0,x\n'
    )
    settings = {"csv": "list.csv", "groups": ("artist", "licence", "label")}
    data = from_folder(path, train=3, **settings)
    assert {name: column.tolist() for name, column in data.groups.items()} == {
        "artist": ["C, d", "B", "Ä."],
        "licence": ["CC0", "CC0", "CC-BY"],
        "label": ["x", "y", "x"],
    }
    only = from_folder(path, train=1, labels=("y",), **settings)
    assert only.groups["artist"].tolist() == ["B"]
    assert from_folder(path, csv="list.csv").groups == {}
    with pytest.raises(
        ValueError, match=r"file, artist, li.* must have file, owner \(data.groups\)"
    ):
        from_folder(path, csv="list.csv", groups=("owner",))
    (path / "list.csv").write_text("file,artist\nb.png,B\ntall.png, \n")
    with pytest.raises(ValueError, match='line 3: `artist` is empty; .* "unknown"'):
        from_folder(path, csv="list.csv", groups=("artist",))
    (path / "list.csv").write_text("file,artist,owner\nb.png,B,x\ntall.png,C,x\n")
    train = from_folder(path, train=2, csv="list.csv", groups=("artist", "owner"))
    said = " ".join(remarks({"train": train}))
    assert "All 2 images have the same `owner`, 'x': there is no group" in said
    assert "Each of the 2 images has a `artist` of its own" in said
    assert "look alike" not in said


def test_names_of_groups_that_look_alike_are_named():
    """In case, composition, width, spaces, and what nobody sees; nothing else is."""
    names = ["anna", "Anna", "Jos\u00e9", "Jose\u0301", "bo", "bo\u200b", "c d", "c  d"]
    train = replace(load(DataConfig(train=9), 8, 1).train, groups={})
    other = replace(train, groups={"artist": np.array([*names, "Jose"])})
    assert remarks({"train": train}) == remarks_on_groups(train) == []
    (said,) = (line for line in remarks({"train": other}) if "alike" in line)
    assert remarks_on_groups(other)[0] == said
    assert said.startswith("Names of `artist` look alike and are different groups: ")
    for pair in ("'Anna' and 'anna'", r"'Jose\u0301' and 'Jos\xe9'", r"'bo\u200b'"):
        assert pair in said
    assert "'Jose'" not in said and "'c  d' and 'c d'" in said


def test_groups_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="data.groups is .* a folder's CSV"):
        DataConfig(groups=("artist",))
    with pytest.raises(ValueError, match="data.groups is .*, but data.csv is empty"):
        DataConfig(source="folder", name="x", groups=("artist",))
    with pytest.raises(ValueError, match="name each once"):
        DataConfig(source="folder", name="x", csv="y", groups=("a", "a"))


def test_a_csv_in_another_encoding_is_refused(gallery):
    path, _ = gallery
    (path / "list.csv").write_bytes("file,label\nb.png,Gemälde\n".encode("latin-1"))
    with pytest.raises(ValueError, match="list.csv is not a text in UTF-8"):
        from_folder(path, csv="list.csv")


def test_wrong_folders_are_refused(gallery):
    path, _ = gallery
    with pytest.raises(ValueError, match="nowhere', which is not a folder"):
        from_folder(path / "nowhere")
    (path / "empty").mkdir()
    with pytest.raises(ValueError, match="There are no pictures below .*empty"):
        from_folder(path / "empty")
    with pytest.raises(ValueError, match="in which there is no CSV missing.csv"):
        from_folder(path, csv="missing.csv")
    with pytest.raises(ValueError, match="data.labels .* images have no labels"):
        from_folder(path, labels=("x",))
    with pytest.raises(ValueError, match=r"The image .*: .* data.center_crop=99"):
        from_folder(path, center_crop=99).images  # noqa: B018


# ArtBench


PAINTERS = {"baroque": ("rubens", "vouet"), "ukiyo_e": ("hokusai", "kuniyoshi")}


def make_artbench(root, split=False):
    """ArtBench-10 in small: two styles, two paintings of either split by each hand."""
    header = "name,artist,url,is_public_domain,length,width,label,split,cifar_index"
    lines, folder = [header], root / f"artbench-10-imagefolder{'-split' * split}"
    for label, artists in PAINTERS.items():
        for index, artist in enumerate(artists * 4):
            part, name = ("train", "test")[index // 4], f"{artist}_no-{index}.jpg"
            lines.append(f"{name},{artist},x://y,True,800,600,{label},{part},{index}")
            file = folder / (part if split else "") / label / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(noise(12, 16, 3, seed=index)))
    (root / "ArtBench-10.csv").write_text("\n".join(lines))
    return root


def from_artbench(path, size=8, train=4, validation=4, **settings):
    """The splits of ArtBench-10 in small."""
    counts = {"train": train, "validation": validation}
    return load(
        DataConfig(source="artbench", name=str(path), **counts, **settings), size, 3
    )


@pytest.mark.parametrize("split", [False, True])
def test_artbench(tmp_path, split):
    settings = {"labels": ("ukiyo_e",), "groups": ("artist", "is_public_domain")}
    splits = from_artbench(make_artbench(tmp_path, split), 6, **settings)
    first = [0, 4]
    for part, start in zip(splits, first, strict=True):
        numbers = range(start, start + 4)
        artists = [PAINTERS["ukiyo_e"][index % 2] for index in numbers]
        names = zip(artists, numbers, strict=True)
        assert part.ids.tolist() == [f"ukiyo_e/{a}_no-{i}.jpg" for a, i in names]
        assert part.label_names == ("baroque", "ukiyo_e")
        assert part.labels.tolist() == [1] * 4
        assert part.captions.tolist() == ["a ukiyo e painting"] * 4
        assert part.groups["artist"].tolist() == artists
        assert set(part.groups["is_public_domain"]) == {"True"}
    picture = Image.fromarray(noise(12, 16, 3, seed=1))
    # The short side is made 6, bilinearly, and one column of eight left out on each.
    resized = np.asarray(picture.resize((8, 6), Image.Resampling.BILINEAR))[:, 1:7]
    np.testing.assert_array_equal(splits.train.images[1], scaled(resized))
    assert len(splits.validation.images) == 4


def test_artbench_in_a_bucket(tmp_path, bucket):
    source = make_artbench(tmp_path)
    for file in filter(Path.is_file, source.rglob("*")):
        target = files.at("gs://bucket/artbench") / str(file.relative_to(source))
        target.write_bytes(file.read_bytes())
    there, here = from_artbench("gs://bucket/artbench"), from_artbench(source)
    np.testing.assert_array_equal(there.train.images, here.train.images)


def test_artbench_that_is_not_complete(tmp_path):
    with pytest.raises(
        ValueError, match="data.name is .* no artbench-10-imagefolder o"
    ):
        from_artbench(tmp_path)
    path = make_artbench(tmp_path)
    with pytest.raises(ValueError, match="it must have name, label, split, owner"):
        from_artbench(path, groups=("owner",))
    with pytest.raises(ValueError, match="split is 'val'; .* 'test', 'train'"):
        from_artbench(path, validation_split="val")
    # What is not used may be missing.
    shutil.rmtree(path / "artbench-10-imagefolder" / "baroque")
    from_artbench(path, labels=("ukiyo_e",)).train.images  # noqa: B018
    with pytest.raises(ValueError, match="image baroque/.*: there is no file .*/baroq"):
        from_artbench(path, labels=("baroque",)).train.images  # noqa: B018
    csv = path / "ArtBench-10.csv"
    csv.write_text(csv.read_text().replace("split", "part"))
    with pytest.raises(ValueError, match="part, cifar_index; it must have name, label"):
        from_artbench(path)
    csv.unlink()
    with pytest.raises(ValueError, match="in which there is no ArtBench-10.csv; launc"):
        from_artbench(path)


def test_captions_by_a_template(tmp_path):
    splits = load(DataConfig(caption="the digit {label}", train=9, validation=2), 8, 1)
    for part in splits:
        digits = [f"the digit {label}" for label in part.labels]
        assert part.captions.tolist() == digits
    path = make_artbench(tmp_path)
    style = {"caption": "{label} by {artist}", "labels": ("ukiyo_e",)}
    train = from_artbench(path, groups=("artist",), **style).train
    assert train.captions.tolist() == ["ukiyo e by hokusai", "ukiyo e by kuniyoshi"] * 2
    with pytest.raises(
        ValueError, match="{artist}'; a field is 'artist'; .* of: 'labe"
    ):
        from_artbench(path, **style)
    with pytest.raises(ValueError, match=r"'artits' \(did you mean artist\?\); it"):
        from_artbench(path, groups=("artist",), caption="{label} {artits}")
    with pytest.raises(ValueError, match="each once. Did you mean artist by"):
        from_artbench(path, groups=("artits",))
    with pytest.raises(ValueError, match=r"'ukioye' \(did you mean ukiyo_e\?\); it"):
        from_artbench(path, labels=("ukioye",))


def test_captions_that_a_model_is_given_may_not_change():
    """Nor vanish; those that nobody has recorded are not missed. A corrected label is
    taken, and the subsets stay those of the first one."""
    train = load(DataConfig(caption="a {label}", train=3), 8, 1).train
    saved = {f"train_{name}": column for name, column in train.columns().items()}
    assert set(saved) == {"train_ids", "train_labels", "train_captions"}
    train.recorded_in(saved, "train", ["caption"])
    old = train.captions[2]
    for captions, message in (
        (
            [*train.captions[:2], "b"],
            f"caption of {train.ids[2]}: {old} -> b: 1 of 3 tr",
        ),
        (None, "the train images have no caption any more"),
    ):
        captions = captions and np.array(captions)
        changed = replace(train, captions=captions, labels=train.labels[::-1])
        with pytest.raises(ValueError, match=message):
            changed.recorded_in(saved, "train", ["caption"])
        recorded = changed.recorded_in(saved, "train")
        np.testing.assert_array_equal(recorded.labels, train.labels[::-1])
        np.testing.assert_array_equal(
            recorded.take([2, 1]).strata, train.labels[[2, 1]]
        )
        again = {f"train_{name}": column for name, column in recorded.columns().items()}
        np.testing.assert_array_equal(
            changed.stratified_as(again, "train").strata, train.labels
        )
    del saved["train_captions"]
    train.recorded_in(saved, "train", ["caption"])


# Queries


def test_pictures_are_queries(gallery):
    path, _ = gallery
    (path / "a/own.png").write_bytes(png(noise(8, 8, 3, seed=7)))
    queries = load_queries(str(path), 8, 3)
    assert queries.ids.tolist()[:2] == ["a/grey.png", "a/own.png"] and len(queries) == 7
    training = from_folder(path, train=7)
    np.testing.assert_array_equal(queries.images, training.images)
    (path / "prompts.csv").write_text("file,caption\ntall.png,a hat\nb.png,a cat\n")
    queries = load_queries(str(path), 8, 3, csv="prompts.csv")
    assert queries.captions.tolist() == ["a cat", "a hat"] and queries.seeds is None
    (path / "prompts.csv").write_text("file,prompt,seed\ntall.png,x,7\nb.png,y,0\n")
    queries = load_queries(str(path), 8, 3, csv="prompts.csv")
    assert queries.captions.tolist() == ["y", "x"] and queries.seeds.tolist() == [0, 7]
    assert queries.take([1]).seeds.tolist() == [7]
    (path / "prompts.csv").write_text("file,artist,x\ntall.png,ada,1\nb.png,ben,2\n")
    queries = load_queries(str(path), 8, 3, "prompts.csv", ("artist", "licence"))
    assert {n: list(c) for n, c in queries.groups.items()} == {"artist": ["ben", "ada"]}


def test_queries_that_cannot_be_are_refused(gallery):
    path, _ = gallery
    with pytest.raises(ValueError, match="queries.folder is .*no', which is not a fo"):
        load_queries(str(path / "no"), 8, 3)
    with pytest.raises(ValueError, match="queries.folder is .* there is no CSV x.csv"):
        load_queries(str(path), 8, 3, csv="x.csv")
    for seed in ("-1", "1.5", str(2**32)):
        (path / "x.csv").write_text(f"file,seed\nb.png,{seed}\n")
        with pytest.raises(
            ValueError, match="line 2: `seed` is .* from 0 to 4294967295"
        ):
            load_queries(str(path), 8, 3, csv="x.csv")


def test_pixels_go_both_ways():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    images = from_pixels(pixels)
    assert images.dtype == np.float32 and (images.min(), images.max()) == (-1, 1)
    np.testing.assert_array_equal(to_pixels(images), pixels)
    np.testing.assert_array_equal(images, pixels.astype(np.float32) / 127.5 - 1)


def test_digests_are_of_pixels():
    images = from_pixels(noise(3, 4, 4, 1))
    images[2] = images[0]
    data = Dataset.of(images, ["a", "b", "c"])
    np.testing.assert_array_equal(data.images, images)
    expected = hashlib.blake2b(images[1].tobytes(), digest_size=8).hexdigest()
    assert data.digests[1] == expected
    assert data.digests[0] == data.digests[2] != data.digests[1]
    none = Dataset.of(images[:0], [])
    assert none.digests.shape == (0,) and none.digests.dtype.kind == "U"
    with pytest.raises(ValueError, match="there are 2 ids for 3 examples"):
        Dataset.of(images, ["a", "b"])
    with pytest.raises(ValueError, match="between 255 and 255"):
        Dataset.of(0 * images + 255, ["a", "b", "c"])


# tensorflow-datasets


TINY = {"train": 30, "test": 12}


class Made(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A data set of `features()`, whose examples `example(name)` makes."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = self.features()
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling="id" not in features,
        )

    def _split_generators(self, manager):
        return {split: self._generate_examples(split) for split in TINY}

    def _generate_examples(self, split):
        for index in range(TINY[split]):
            name = f"{split}_{index}"
            yield name if "id" in self.features() else index, self.example(name)


class Tiny(Made):
    """Encoded images of different sizes, with ids, labels and captions."""

    def features(self):
        return {
            "image": tfds.features.Image(encoding_format="png"),
            "label": tfds.features.ClassLabel(names=["cat", "dog", "owl"]),
            "caption": tfds.features.Text(),
            "id": tfds.features.Text(),
        }

    def example(self, name):
        return {
            "image": png(self.pixels(name)),
            "label": int(name.split("_")[1]) % 3,
            "caption": f"ein schönes {name}",
            "id": name,
        }

    @staticmethod
    def pixels(name):
        """The pixels of an example: 8 rows, 8 to 10 columns."""
        split, index = name.split("_")
        index = int(index)
        return noise(8, 8 + index % 3, 3, seed=index + 100 * (split == "test"))


class TinyTensor(Made):
    """Plain grey tensors, with nothing else; every pixel is the position."""

    def features(self):
        return {"pixels": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8)}

    def example(self, name):
        return {"pixels": np.full((8, 8, 1), int(name.split("_")[1]), np.uint8)}


class TinyDepth(Made):
    """No image that could be used."""

    def features(self):
        return {"depth": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.float32)}

    def example(self, name):
        return {"depth": np.zeros((8, 8, 1), np.float32)}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A directory in which the three sets above are prepared, without TensorFlow."""
    path = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    for builder in (Tiny, TinyTensor, TinyDepth):
        builder(data_dir=path, file_format="array_record").download_and_prepare()
    return path


@pytest.fixture
def data_dir(store, monkeypatch):
    """The same, as if TFDS_DATA_DIR had named it before tfds was imported."""
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(store))
    return store


def from_tfds(name, size=8, channels=3, train=10, validation=5, **settings):
    """The splits of a prepared data set."""
    config = DataConfig(
        source="tfds", name=name, train=train, validation=validation, **settings
    )
    return load(config, size, channels)


def test_prepared_images_keep_pixels_labels_captions_and_ids(data_dir):
    splits = from_tfds("tiny", train=10, validation=6)
    assert all(name.startswith("train_") for name in splits.train.ids)
    assert all(name.startswith("test_") for name in splits.validation.ids)
    assert splits.train.label_names == ("cat", "dog", "owl")
    assert sorted(np.bincount(splits.train.labels)) == [3, 3, 4]
    assert np.bincount(splits.validation.labels).tolist() == [2, 2, 2]
    for part in (splits.train, splits.validation):
        for name, image, label, caption in zip(
            part.ids, part.images, part.labels, part.captions, strict=True
        ):
            pixels = Tiny.pixels(name)
            left = round((pixels.shape[1] - 8) / 2)
            np.testing.assert_array_equal(image, scaled(pixels[:, left : left + 8]))
            assert label == int(name.split("_")[1]) % 3
            assert caption == f"ein schönes {name}"


def test_only_used_images_are_decoded(data_dir, monkeypatch):
    from dtrak_jax.data import prepared

    decoded = []
    original = prepared.decode
    monkeypatch.setattr(
        prepared, "decode", lambda file: decoded.append(file) or original(file)
    )
    splits = from_tfds("tiny", train=4, validation=3, groups=("label",))
    for part in (splits.train, splits.validation):
        columns = (part.ids, part.labels, part.captions, part.groups["label"])
        assert {len(column) for column in columns} == {len(part)}
    assert decoded == []
    for _ in range(2):
        assert splits.validation.images.shape == (3, 8, 8, 3)
    assert len(decoded) == 3


def test_features_of_a_prepared_set_are_groups(data_dir):
    train = from_tfds("tiny", groups=("caption", "label")).train
    assert train.groups["caption"].tolist() == list(train.captions)
    names = [("cat", "dog", "owl")[number] for number in train.labels]
    assert train.groups["label"].tolist() == names
    with pytest.raises(
        ValueError, match="data.groups is 'image'; .* 'caption', 'id', 'label'"
    ):
        from_tfds("tiny", groups=("image",))
    with pytest.raises(ValueError, match="data.groups is 'artist'; it must"):
        from_tfds("tiny", groups=("artist",))


def test_a_prepared_set_is_filtered_by_label(data_dir):
    splits = from_tfds("tiny", labels=("dog", "2"), train=8, validation=4)
    assert np.bincount(splits.train.labels).tolist() == [0, 4, 4]
    assert splits.train.notes == ("data.labels has '2', the number of 'owl'.",)
    assert np.bincount(splits.validation.labels).tolist() == [0, 2, 2]


def test_one_split_is_shared(data_dir):
    splits = from_tfds("tiny", train=20, validation=10, validation_split="train")
    check_ids([*splits.train.ids, *splits.validation.ids], 30)
    with pytest.raises(ValueError, match="data.validation is 11, .* only 10 examples"):
        from_tfds("tiny", train=20, validation=11, validation_split="train")


def test_positions_are_ids_where_there_are_none(data_dir):
    splits = from_tfds(
        "tiny_tensor",
        channels=1,
        train=6,
        validation=25,
        train_split="train[10:16]",
        validation_split="test[8:]+train[3:]",
    )
    assert splits.train.ids.tolist() == [f"train-{i:06d}" for i in range(10, 16)]
    # Slices overlap, and still no training image is a validation image.
    left = [*range(3, 10), *range(16, 30)]
    assert splits.validation.ids.tolist() == [
        *(f"test-{i:06d}" for i in range(8, 12)),
        *(f"train-{i:06d}" for i in left),
    ]
    for part in (splits.train, splits.validation):
        for name, image in zip(part.ids, part.images, strict=True):
            assert (image == np.float32(int(name[-6:])) / np.float32(127.5) - 1).all()
    assert splits.train.labels is None and splits.train.captions is None


def test_a_set_that_is_not_prepared(data_dir):
    with pytest.raises(
        ValueError,
        match="cifar10 is not prepared in .*cifar10.* pip install tensorflow-cpu && "
        "tfds build cifar10 --file_format=array_record",
    ):
        from_tfds("cifar10")


def test_wrong_names_and_splits(data_dir):
    with pytest.raises(
        ValueError, match="'cifr10', .* not know; did you mean .*cifar10"
    ):
        from_tfds("cifr10")
    with pytest.raises(ValueError, match="data.name is 'tiny:9.9.9': .*only: 1.0.0"):
        from_tfds("tiny:9.9.9")
    with pytest.raises(ValueError, match="data.name is 'a b': "):
        from_tfds("a b")
    with pytest.raises(ValueError, match="Unknown split 'valid'.*'train', 'test'"):
        from_tfds("tiny", validation_split="valid")
    with pytest.raises(ValueError, match="tiny cannot be read: .*train.:3"):
        from_tfds("tiny", train_split="train[:3")
    with pytest.raises(ValueError, match="the id 'train_.*' occurs more than once"):
        from_tfds("tiny", train_split="train+train")
    with pytest.raises(ValueError, match="tiny_depth has no .* image .*; it has depth"):
        from_tfds("tiny_depth")


def test_a_format_that_needs_tensorflow(data_dir, tmp_path, monkeypatch):
    shutil.copytree(data_dir / "tiny", tmp_path / "tiny")
    info = tmp_path / "tiny" / "1.0.0" / "dataset_info.json"
    content = json.loads(info.read_text())
    info.write_text(json.dumps(content | {"fileFormat": "tfrecord"}))
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path))
    with pytest.raises(ValueError, match="as tfrecord, .* tfds build tiny --file_form"):
        from_tfds("tiny")


def test_cifar2(mocked):
    names = ["airplane", "automobile", "bird", "cat", "deer"]
    names += ["dog", "frog", "horse", "ship", "truck"]
    with mocked("cifar10", 150, ("train", "test"), names):
        splits = from_tfds("cifar10", 32, labels=("automobile", "7"))
    assert splits.train.images.shape == (10, 32, 32, 3)
    assert set(splits.train.labels) == set(splits.validation.labels) == {1, 7}
    # The mock has the same records in both splits.
    check_ids([*splits.train.ids, *splits.validation.ids], 15)


def test_celeba(mocked):
    with mocked("celeb_a", 12, ("train", "validation")):
        splits = from_tfds(
            "celeb_a", 64, center_crop=140, validation_split="validation"
        )
    assert splits.train.images.shape == (10, 64, 64, 3)
    assert splits.validation.images.shape == (5, 64, 64, 3)
    assert splits.train.labels is None and splits.train.label_names == ()
    assert splits.validation.ids[0].startswith("validation-")


def test_labels_that_are_gone_are_a_correction():
    """A column of groups that is not asked for any more is none."""
    ids, before = np.array(["a", "b"]), np.array(["x", "y"])
    columns = {"label": before, "artist": before}
    (gone,) = corrections(ids, columns, {})
    assert (gone.column, gone.example) == ("label", "label of a: x -> none")
    assert gone.rows.tolist() == [0, 1]
    assert not corrections(ids, {}, columns)
