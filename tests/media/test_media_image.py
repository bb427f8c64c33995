"""load_image: every kind of image becomes upright 8-bit RGB, or is refused with a typed error."""

import os
import pickle
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features
from PIL.PngImagePlugin import PngInfo

from mllm.media import MediaError, MediaLimits, load_image
from mllm.media.image import header_pixels


@pytest.fixture
def pixels() -> np.ndarray:
    """Return (5, 8, 3) random colours."""
    return np.random.default_rng(0).integers(0, 256, (5, 8, 3), dtype=np.uint8)


def png_with_size(width: int, height: int) -> bytes:
    """Return a PNG of a few bytes whose header claims any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a, 2).transpose(1, 0, 2)),
        (8, np.rot90),
    ],
)
def test_exif_rotation_is_applied(tmp_path: Path, orientation: int, upright) -> None:
    stored = np.zeros((32, 48, 3), dtype=np.uint8)
    stored[:16, :16] = 255
    stored[16:, :16] = 128
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "a.jpg", quality=95, exif=exif)
    loaded = np.asarray(load_image(tmp_path / "a.jpg")).astype(int)
    expected = upright(stored).astype(int)
    assert loaded.shape == expected.shape
    assert np.abs(loaded - expected).mean() < 2


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp"])
def test_lossless_colours_come_back_equal(tmp_path: Path, pixels: np.ndarray, suffix: str) -> None:
    options = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", **options)
    image = load_image(tmp_path / f"a.{suffix}")
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), pixels)


def test_gray_with_alpha_is_composited_on_white(tmp_path: Path) -> None:
    gray, alpha = np.array([[0, 0, 100, 200]], dtype=np.uint8), np.array([[0, 255, 128, 51]], dtype=np.uint8)
    Image.fromarray(np.stack([gray, alpha], axis=2), mode="LA").save(tmp_path / "a.png")
    expected = gray * (alpha / 255) + 255 * (1 - alpha / 255)
    loaded = np.asarray(load_image(tmp_path / "a.png"))
    np.testing.assert_allclose(loaded, np.repeat(expected[..., None], 3, axis=2), atol=1)


def test_transparent_palette_entry_becomes_white(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=1)
    assert np.asarray(load_image(tmp_path / "a.png")).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_16_bit_gray_is_scaled_not_clipped(tmp_path: Path) -> None:
    deep = np.array([[0, 257, 300, 25_700, 65_535]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "a.png")
    expected = np.rint(deep / 257).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "a.png"))[..., 0], expected)


def test_cmyk_and_one_bit_images(tmp_path: Path) -> None:
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red.save(tmp_path / "red.jpg", quality=95)
    assert np.abs(np.asarray(load_image(tmp_path / "red.jpg")).astype(int) - [255, 0, 0]).max() < 8
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bits.png")
    assert np.asarray(load_image(tmp_path / "bits.png")).tolist() == [[[255] * 3, [0] * 3]]


def test_the_first_image_of_a_phone_jpeg_is_read(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    first.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[second], quality=95)
    red, _, blue = np.asarray(load_image(tmp_path / "phone.jpg"))[8, 8]
    assert red > 200 > 100 > blue


def test_a_gif_of_one_image_is_read_whatever_its_name(tmp_path: Path) -> None:
    """OCR-VQA's covers, which LLaVA's download names .jpg, hold some."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "cover.jpg", format="GIF")
    assert np.asarray(load_image(tmp_path / "cover.jpg"))[4, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_of_an_animation_the_first_frame_is_the_image(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    red, green, blue = np.asarray(load_image(tmp_path / f"a.{suffix}"))[4, 4]
    assert red > 240
    assert max(green, blue) < 15


def test_a_png_is_read_whatever_profile_and_texts_it_holds(tmp_path: Path, pixels: np.ndarray) -> None:
    """Pillow alone refuses both: an ICC profile and a text that unpack to more than a megabyte."""
    noise = np.random.default_rng(1).integers(0, 256, 3 * 2**20, dtype=np.uint8).tobytes()
    notes = PngInfo()
    notes.add_text("Software", "x" * (2 * 2**20), zip=True)
    Image.fromarray(pixels).save(tmp_path / "text.png", pnginfo=notes)
    Image.fromarray(pixels).save(tmp_path / "icc.png", icc_profile=noise)
    for name in ("text.png", "icc.png"):
        with pytest.raises(ValueError, match="too large"), Image.open(tmp_path / name) as image:
            image.load()
        np.testing.assert_array_equal(np.asarray(load_image(tmp_path / name)), pixels)
        assert header_pixels(tmp_path / name) == pixels.shape[:2]


@pytest.mark.parametrize("way", ["exif", "raw profile", "xmp"])
def test_a_png_is_turned_as_it_says_also_beside_a_large_text(tmp_path: Path, pixels: np.ndarray, way: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    notes = PngInfo()
    notes.add_text("Software", "x" * (2 * 2**20), zip=True)
    if way == "raw profile":  # as ImageMagick writes it
        content = b"Exif\0\0" + exif.tobytes().removeprefix(b"Exif\0\0")
        notes.add_text("Raw profile type exif", f"\nexif\n{len(content):8d}\n{content.hex()}\n", zip=True)
    if way == "xmp":
        words = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
        notes.add_itxt("XML:com.adobe.xmp", words, zip=True)
    more = {"exif": exif} if way == "exif" else {}
    Image.fromarray(pixels).save(tmp_path / "a.png", pnginfo=notes, **more)
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "a.png")), np.rot90(pixels, -1))


def test_a_png_cut_off_inside_its_profile_is_corrupt(tmp_path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=bytes(4_000))
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:50])
    with pytest.raises(MediaError, match=r"decoder|header") as caught:
        load_image(tmp_path / "a.png")
    assert caught.value.kind == "corrupt"


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_deflate"])
def test_tiff_comes_back_equal(tmp_path: Path, pixels: np.ndarray, compression: str) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.tiff", compression=compression)
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "a.tiff")), pixels)


def test_a_tiff_of_16_bits_and_one_of_several_pages(tmp_path: Path, pixels: np.ndarray) -> None:
    deep = np.array([[0, 257, 300, 25_700, 65_535]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.tif")
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "deep.tif"))[..., 0], np.rint(deep / 257))
    page = Image.fromarray(pixels)
    page.save(tmp_path / "pages.tif", save_all=True, append_images=[page, page])
    with pytest.raises(MediaError, match="the file has 3 pages") as caught:
        load_image(tmp_path / "pages.tif")
    assert caught.value.kind == "unsupported"


def smooth(height: int = 64, width: int = 96) -> np.ndarray:
    """Return (H, W, 3) slopes, which lossy formats keep well, the left upper corner dark."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 2, columns * 2, (rows + columns)], axis=2).astype(np.uint8)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow does not write AVIF; 11.3 and later do")
def test_avif_is_read(tmp_path: Path) -> None:
    Image.fromarray(smooth()).save(tmp_path / "a.jpg", format="AVIF", quality=95)  # whatever its name
    assert np.abs(np.asarray(load_image(tmp_path / "a.jpg")).astype(int) - smooth()).mean() < 3
    assert header_pixels(tmp_path / "a.jpg") == (64, 96)
    with pytest.raises(MediaError, match="more than 100 pixels") as caught:
        load_image(tmp_path / "a.jpg", limits=MediaLimits(image_pixels=100))
    assert caught.value.kind == "limit"
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:300])
    with pytest.raises(MediaError, match=r"decoder|header"):
        load_image(tmp_path / "a.jpg")


def test_heic_is_read_upright_under_the_same_limits(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed (extra heif; make test installs it)")
    heif.from_pillow(Image.fromarray(smooth())).save(tmp_path / "a.heic", quality=95)
    assert np.abs(np.asarray(load_image(tmp_path / "a.heic")).astype(int) - smooth()).mean() < 4
    assert header_pixels(tmp_path / "a.heic") == (64, 96)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = heif.from_pillow(Image.fromarray(smooth()))
    turned.save(tmp_path / "b.heic", quality=95, exif=exif.tobytes())
    expected = np.rot90(smooth(), -1)
    assert np.abs(np.asarray(load_image(tmp_path / "b.heic")).astype(int) - expected).mean() < 4
    assert header_pixels(tmp_path / "b.heic") == (96, 64)
    for limits in (MediaLimits(image_pixels=100), MediaLimits(image_bytes=100)):
        with pytest.raises(MediaError, match="than 100") as caught:
            load_image(tmp_path / "a.heic", limits=limits)
        assert caught.value.kind == "limit"
    (tmp_path / "a.heic").write_bytes((tmp_path / "a.heic").read_bytes()[:400])
    with pytest.raises(MediaError, match="decoder") as caught:
        load_image(tmp_path / "a.heic")
    assert caught.value.kind == "corrupt"


def test_heic_without_the_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    with pytest.raises(MediaError, match=r"pip install -e '\.\[heif\]'") as caught:
        load_image(tmp_path / "a.heic")
    assert caught.value.kind == "unsupported"


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tif"])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(MediaError, match=r"decoder|header") as caught:
        load_image(path)
    assert caught.value.kind == "corrupt"


@pytest.mark.parametrize(("width", "height"), [(6_400, 6_300), (65_000, 65_000)])
def test_a_forged_size_is_refused_from_the_header(tmp_path: Path, width: int, height: int) -> None:
    (tmp_path / "bomb.png").write_bytes(png_with_size(width, height))
    with pytest.raises(MediaError, match="more than 40000000 pixels") as caught:
        load_image(tmp_path / "bomb.png")
    assert caught.value.kind == "limit"


def test_limits_can_be_set(tmp_path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", limits=MediaLimits(image_pixels=40)).size == (8, 5)
    with pytest.raises(MediaError, match="more than 39 pixels"):
        load_image(tmp_path / "a.png", limits=MediaLimits(image_pixels=39))
    with pytest.raises(MediaError, match="larger than 50 bytes"):
        load_image(tmp_path / "a.png", limits=MediaLimits(image_bytes=50))
    with pytest.raises(ValueError, match="image_bytes must be above 0"):
        MediaLimits(image_bytes=0)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda path: None, "missing"),
        (lambda path: path.mkdir(), "refused"),
        (os.mkfifo, "refused"),
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.write_text("no image"), "unsupported"),
        (lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n"), "unsupported"),
        (lambda path: path.symlink_to("/dev/zero"), "refused"),
        (lambda path: path.symlink_to("/proc/self/environ"), "empty"),
    ],
)
def test_what_is_no_image_file(tmp_path: Path, make, kind: str) -> None:
    make(tmp_path / "a.png")
    with pytest.raises(MediaError, match=r"a\.png: ") as caught:
        load_image(tmp_path / "a.png")
    assert caught.value.kind == kind


def test_the_error_survives_pickling_and_hides_what_the_decoder_said(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_with_size(8, 8))
    with pytest.raises(MediaError, match="could not read") as caught:
        load_image(tmp_path / "a.png")
    error = caught.value
    copy = pickle.loads(pickle.dumps(error))
    assert (
        (copy.kind, copy.path, copy.reason)
        == (error.kind, error.path, error.reason)
        == (
            "corrupt",
            str(tmp_path / "a.png"),
            "the decoder could not read the file",
        )
    )
    assert error.__cause__ is not None
    assert str(error.__cause__) not in str(error)
