"""Pictures of any format are read right, counted where changed, or refused."""

import dataclasses
import io
import warnings
from collections import Counter

import numpy as np
import pytest
from conftest import NO_ATTENTION, png
from PIL import Image

import dtrak_jax as dtrak
from dtrak_jax import files
from dtrak_jax.config import Config, DataConfig, QueriesConfig, SampleConfig
from dtrak_jax.data import Dataset, dataset, from_pixels, load, preprocess, remarks
from dtrak_jax.data.preprocess import decode
from dtrak_jax.run import Run

RGB = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
GREY = RGB[..., :1]
ALPHA = np.where(RGB[..., 0] < 99, 0, 255).astype(np.uint8)
FRAMES = [Image.fromarray(np.roll(RGB, i, axis=0)) for i in range(3)]
ALL = {"save_all": True, "append_images": FRAMES[1:]}
SEVERAL = "with several frames, of which the first is taken"


def written(image, kind, **options):
    """The bytes of a picture in a format."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read(content, channels=3, **options):
    """The picture that a model sees of bytes."""
    return preprocess(decode(io.BytesIO(content)), 32, channels, **options)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {}) for kind in ("bmp", "png", "ppm", "tga", "ico", "jpeg2000")),
        ("webp", {"lossless": True}),
        ("tiff", {"compression": "tiff_lzw"}),
        ("png", ALL),
        ("webp", {"lossless": True, **ALL}),
        ("tiff", ALL),
    ],
)
def test_lossless_formats_keep_every_pixel(kind, options):
    """Of the first frame; and what is cut short is refused, not filled up."""
    content = written(FRAMES[0], kind, **options)
    pixels, changes = read(content)
    np.testing.assert_array_equal(pixels, from_pixels(RGB))
    assert changes == ((SEVERAL,) if options.get("save_all") else ())
    for part in (0, 0.1, 0.3 if changes else 0.9):
        with pytest.raises(ValueError, match="it is not a readable image"):
            read(content[: int(len(content) * part)])


@pytest.mark.parametrize("kind", ["png", "tiff", "ppm"])
def test_sixteen_bits_are_not_cut_to_eight(kind):
    deep = RGB[..., 0].astype(np.uint16) * 256 + 77
    pixels, changes = read(written(Image.fromarray(deep), kind), channels=1)
    np.testing.assert_allclose(pixels[..., 0], deep / 32767.5 - 1, rtol=0, atol=1e-6)
    assert changes == ("of 16 bits",)
    _, changes = read(written(Image.fromarray(deep // 16), kind))
    assert changes == ("of 16 bits and almost black",)
    for fraction in (np.float32, np.int32):
        with pytest.raises(ValueError, match="it has pixels .*; save it with 8"):
            read(written(Image.fromarray(deep.astype(fraction)), "tiff"))


def test_transparency_is_laid_on_the_background():
    image = Image.fromarray(np.dstack([RGB, ALPHA]))
    seen = ALPHA[..., None] > 0
    for background, colour in (("white", 255), ("#000080", [0, 0, 128])):
        expected = np.where(seen, RGB, colour).astype(np.uint8)
        for content in (
            written(image, "png"),
            written(image, "webp", lossless=True),
            written(image, "tiff"),
        ):
            pixels, changes = read(content, background=background)
            np.testing.assert_array_equal(pixels, from_pixels(expected))
            assert changes == (f"with transparency on {background}",)
    hidden = np.dstack([RGB, 0 * ALPHA])
    changes = read(png(hidden)).changes
    assert changes == ("wholly transparent on white", "of one colour")
    palette = FRAMES[0].quantize(8)
    expected = np.asarray(palette.convert("RGB")).copy()
    expected[np.asarray(palette) == 3] = 255
    pixels, _ = read(written(palette, "png", transparency=3))
    np.testing.assert_array_equal(pixels, from_pixels(expected))
    grey = written(
        Image.fromarray(GREY[..., 0]), "png", transparency=int(GREY[0, 0, 0])
    )
    assert read(grey, 1).pixels[0, 0] == 1
    with pytest.raises(ValueError, match="data.background is 'whit'; .* as 'white' or"):
        DataConfig(background="whit")


def test_other_colours_are_converted():
    np.testing.assert_array_equal(
        read(written(FRAMES[0].convert("CMYK"), "tiff")).pixels, from_pixels(RGB)
    )
    black_and_white = FRAMES[0].convert("1")
    pixels, changes = read(written(black_and_white, "png"), channels=1)
    np.testing.assert_array_equal(pixels[..., 0] > 0, np.asarray(black_and_white))
    assert set(np.unique(pixels)) == {-1, 1} and changes == ()
    assert read(png(RGB), channels=1).changes == ("in colour made grey",)
    assert read(png(np.repeat(GREY, 3, axis=2)), channels=1).changes == ()


@pytest.fixture
def folder(tmp_path):
    """Five pictures: transparent and small, wide, twice the same, and an empty file."""
    pictures = {
        "a/alpha.png": np.dstack([RGB, ALPHA])[:16, :16],
        "a/wide.png": np.tile(RGB, (1, 2, 1)),
        "b/one.PNG": RGB,
        "b/two.png": RGB,
    }
    for name, pixels in pictures.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(pixels))
    return tmp_path


def test_a_folder_in_one_line_of_python(folder):
    """Its warnings are all that happened to the pictures."""
    with pytest.warns(UserWarning) as said:
        images = dtrak.load_images(folder, 32)
    lines = [str(warning.message) for warning in said]
    assert (
        lines[0] == f"{folder}: labels are the names of its subfolders: a (2), b (2)."
    )
    counts = "1 with transparency on white, 1 enlarged, 1 cut to a square"
    assert lines[1] == f"4 pictures: {counts}."
    assert "1 of 4 pictures, such as b/two.png (b/one.PNG)" in lines[2]
    assert len(lines) == 3
    assert images.images.shape == (4, 32, 32, 3) and images.labels.tolist() == [
        0,
        0,
        1,
        1,
    ]
    np.testing.assert_array_equal(images.images[2], from_pixels(RGB))
    with pytest.raises(
        ValueError, match="a/wide.png: it has 64x32 .* first image 16x16"
    ):
        dtrak.load_images(folder)
    (folder / "a/list.csv").write_text("file,prompt,seed,by\nwide.png,a hat,7,ada\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own = dtrak.load_images(f"{folder}/a", csv="list.csv", groups=["by"])
    np.testing.assert_array_equal(own.images[0, :, :32], from_pixels(RGB))
    assert (own.captions[0], own.seeds[0], own.groups["by"][0]) == ("a hat", 7, "ada")
    with pytest.warns(UserWarning, match="list.csv is not read; the setting csv names"):
        dtrak.load_images(f"{folder}/a", 32)
    (folder / "a/list.csv").write_text("file,label\nwide.png,10\n")
    with pytest.warns(
        UserWarning, match="positions in label_names, such as 0 for '10'"
    ):
        dtrak.load_images(f"{folder}/a", 32, csv="list.csv")
    for wrong, message in (
        ({"channels": 4}, "channels is 4; it must be one of: 1, 3"),
        ({"size": 0}, "size is 0; it must be an integer >= 1"),
        ({"background": "none"}, "background is 'none'; it must be a colour"),
        ({"groups": ["by"]}, "groups is .*, but csv is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            dtrak.load_images(folder, **wrong)
    (folder / "b/two.png").write_bytes(b"")
    (folder / "a/alpha.png").write_bytes(b"no")
    with pytest.raises(ValueError, match="a/alpha.png: .* 1 more .* such as b/two.png"):
        dtrak.load_images(folder, 32)


def test_a_renamed_picture_is_said_to_be_the_same():
    images = from_pixels(RGB[:16].reshape(4, 8, 16, 3))
    plain, others = Dataset.of(images, list("abcd")), images[:, ::-1]
    saved = {"train_ids": plain.ids, "train_digests": plain.digests}
    for pixels, words in (
        (images, "; z is the same picture as d was, under another id, .*"),
        (np.concatenate([images[:3], others[3:]]), ""),
    ):
        renamed = Dataset.of(pixels, list("abcz"))
        message = f"other ids than .* their order has changed{words}. Restore them"
        with pytest.raises(ValueError, match=message):
            renamed.recorded_in(saved, "train")

    def damaged(row):
        raise ValueError("it is damaged")

    with pytest.raises(ValueError, match="their order has changed. Restore them"):
        dataclasses.replace(renamed, read=damaged).recorded_in(saved, "train")


def test_pictures_are_decoded_once_and_may_be_too_many_to_keep(monkeypatch):
    reads, images = Counter(), from_pixels(RGB[:16].reshape(4, 8, 16, 3))
    plain = Dataset.of(images, list("abcd"))

    def count(row):
        reads[row] += 1
        return plain.read(row)

    counted = dataclasses.replace(plain, read=count)
    saved = {"train_ids": plain.ids, "train_digests": counted.digests}
    np.testing.assert_array_equal(counted.recorded_in(saved, "train").images, images)
    assert set(reads.values()) == {1}
    monkeypatch.setattr(dataset, "KEPT", images.nbytes - 1)
    large = dataclasses.replace(plain)
    assert large.decoded.images is None and large.digests.tolist() == list(
        plain.digests
    )
    np.testing.assert_array_equal(large.images, images)


def test_zero_takes_all_that_validation_leaves():
    some = DataConfig(train=0, validation=97, seed=3)
    train, validation = load(some, 8, 1)
    assert len(train) == 1700 and len(set(train.ids) | set(validation.ids)) == 1797
    share = np.bincount(train.labels) * 97 / 1700
    assert (abs(np.bincount(validation.labels) - share) < 2).all()
    assert len(load(DataConfig(train=0, validation=0), 8, 1).train) == 1797
    with pytest.raises(ValueError, match="data.validation=1797 leaves none"):
        load(DataConfig(train=0, validation=1797), 8, 1)


def test_validation_images_may_have_a_folder_of_their_own(folder):
    (folder / "a/list.csv").write_text("file,label\nwide.png,7\nalpha.png,cat\n")
    own = {"validation_folder": str(folder / "a"), "csv": "list.csv", "train": 5}
    validation = load(DataConfig(validation=0, **own), 32, 1).validation
    assert validation.ids.tolist() == ["alpha.png", "wide.png"]
    # Labels are numbered as those of training images, and further ones follow.
    assert validation.labels.tolist() == [10, 7]
    assert validation.label_names == (*"0123456789", "cat")
    assert len(load(DataConfig(validation=1, **own), 32, 1).validation) == 1
    with pytest.raises(ValueError, match="is 3, .* only 2 examples in .*; 0 takes all"):
        load(DataConfig(validation=3, **own), 32, 1)
    with pytest.raises(
        ValueError, match="data.validation_folder is 'no', which is not"
    ):
        load(DataConfig(validation_folder="no"), 8, 1)


def test_a_run_says_once_what_it_did_to_pictures(folder, tmp_path_factory):
    """Also of queries that are given, and which of them are training images."""
    queries, workdir = (
        tmp_path_factory.mktemp("queries"),
        tmp_path_factory.mktemp("run"),
    )
    (queries / "same.png").write_bytes(png(RGB))
    (queries / "other.png").write_bytes(png(RGB[::-1]))
    (queries / "list.csv").write_text("file;prompt;seed\nsame.png;x;1\nother.png;y;2\n")
    config = Config(
        data=DataConfig(
            source="folder",
            name=str(folder),
            train=0,
            validation=0,
            validation_folder=str(queries),
        ),
        model=dataclasses.replace(
            NO_ATTENTION, sample_size=32, in_channels=3, out_channels=3
        ),
        queries=QueriesConfig(folder=str(queries), csv="list.csv"),
    )
    run = Run.at(config, workdir)
    run.record()
    assert run.counts == {"train": 4, "validation": 2, "generated": 2}
    assert not files.at(workdir / "splits.npz").exists()
    with pytest.warns(UserWarning) as said:
        run.splits  # noqa: B018
    lines = [str(warning.message) for warning in said]
    assert "4 training images: 1 with transparency on white" in " ".join(lines)
    assert "list.csv: `seed` is not used, as queries that are given" in " ".join(lines)
    assert lines[-1] == "Captions of queries are not used: the network takes none."
    for name in ("validation images", "queries"):
        assert any(f"1 of 2 {name}, such as same.png (b/" in line for line in lines)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(Run.at(config, workdir).splits.train.images) == 4


def test_nothing_is_said_of_pictures_that_nothing_was_done_to():
    splits = load(DataConfig(train=50, validation=20), 8, 1)
    assert remarks(splits._asdict(), uses_captions=False) == []
    own = DataConfig(validation=0, validation_folder="x")
    only = Config(data=own, sample=SampleConfig(count=0))
    assert only.query_sets == ("validation",)
