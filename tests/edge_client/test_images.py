"""Photos become the pixels that CLIP's own Pillow preprocessing makes, and bad ones a PhotoError each."""

import contextlib
import io
import os
import struct
import subprocess
import sys
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from fedmpt.edge_client import images
from fedmpt.edge_client.images import PhotoError, decode_pixels, load_pixels

SIZE = 64
PHOTOS = Path(os.environ.get("FEDMPT_PHOTOS", Path(__file__).parents[2] / ".." / "shared" / "photos"))


def picture(mode="RGB", width=150, height=101, seed=0):
    """Smooth colours with noise on top, in any of Pillow's modes."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([x * 255 / width, y * 255 / height, (x + y) % 256], -1)
    pixels = np.clip(base + random.normal(0, 20, base.shape), 0, 255).astype(np.uint8)
    image = Image.fromarray(pixels)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(((x * 7) % 256).astype(np.uint8)))
    if mode in ("P", "PA"):
        return image.quantize(32)
    return image.convert(mode)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def clip_pixels(data, size):
    """What transformers' Pillow processor makes of the upright image, before rescaling and normalising."""
    transformers = pytest.importorskip("transformers")
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        do_rescale=False,
        do_normalize=False,
    )
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image)
        return np.moveaxis(np.asarray(processor(upright)["pixel_values"][0]), 0, -1)


def assert_as_clip(data, size=SIZE):
    pixels = decode_pixels(data, size, "photo")
    assert pixels.shape == (size, size, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - clip_pixels(data, size).astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("width", "height"), [(150, 101), (101, 150), (64, 64), (65, 64), (40, 30), (640, 65), (7, 500), (1, 1)]
)
def test_pixels_equal_clips_own_at_every_aspect(width, height):
    assert_as_clip(encoded(picture(width=width, height=height)))


@pytest.mark.parametrize("size", [1, 7, 112, 224])
def test_pixels_equal_clips_own_at_every_model_size(size):
    assert_as_clip(encoded(picture()), size)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_pixels_equal_clips_own_for_every_png_mode(mode):
    assert_as_clip(encoded(picture(mode)))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_pixels_equal_clips_own_for_every_jpeg_mode(mode):
    assert_as_clip(encoded(picture(mode), "JPEG", quality=90))


@pytest.mark.parametrize("kind", ["WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000"])
def test_pixels_equal_clips_own_for_other_formats(kind):
    assert_as_clip(encoded(picture(), kind))


def test_a_transparent_palette_colour_shows_white():
    image = Image.new("P", (SIZE, SIZE), 0)
    image.putpalette([200, 0, 0] + [0] * 765)
    data = encoded(image, transparency=0)
    assert (decode_pixels(data, SIZE, "photo") == 255).all()
    assert_as_clip(data)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert_as_clip(encoded(picture(), "JPEG", exif=exif))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_a_tiff_is_applied_once(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert_as_clip(encoded(picture(), "TIFF", exif=exif))


def test_rotated_photo_has_its_top_on_top():
    upright = Image.new("RGB", (SIZE, SIZE), "blue")
    upright.paste("red", (0, 0, SIZE, SIZE // 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    pixels = decode_pixels(encoded(upright.rotate(90), exif=exif), SIZE, "photo")
    assert (pixels[: SIZE // 2] == (255, 0, 0)).all()
    assert (pixels[SIZE // 2 :] == (0, 0, 255)).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_lose_the_photo():
    data = encoded(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode_pixels(data, SIZE, "photo").shape == (SIZE, SIZE, 3)


def test_sixteen_bit_grey_is_scaled_to_eight_bits():
    eight = np.asarray(picture("L"))
    sixteen = Image.fromarray(eight.astype(np.uint16) * 257)
    for data in (encoded(sixteen), encoded(sixteen, "TIFF")):
        assert np.array_equal(decode_pixels(data, SIZE, "x"), decode_pixels(encoded(picture("L")), SIZE, "x"))


def test_sixteen_bit_pgm_is_scaled_to_eight_bits():
    eight = np.asarray(picture("L"))
    data = b"P5 150 101 65535\n" + (eight.astype(">u2") * 257).tobytes()
    assert np.array_equal(decode_pixels(data, SIZE, "x"), decode_pixels(encoded(picture("L")), SIZE, "x"))


def test_sixteen_bit_grey_whose_white_is_zero_is_inverted():
    eight = np.asarray(picture("L"))
    data = encoded(Image.fromarray((255 - eight).astype(np.uint16) * 257), "TIFF")
    black_is_zero, white_is_zero = (struct.pack("<HHII", 0x0106, 3, 1, value) for value in (1, 0))
    assert black_is_zero in data
    data = data.replace(black_is_zero, white_is_zero)
    assert np.array_equal(decode_pixels(data, SIZE, "x"), decode_pixels(encoded(picture("L")), SIZE, "x"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_large_photos_are_worked_on_in_strips_to_the_same_bits(monkeypatch, mode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(mode), exif=exif)
    whole = decode_pixels(data, SIZE, "photo")
    monkeypatch.setattr(images, "WHOLE_PIXELS", 0)
    monkeypatch.setattr(images, "STRIP_PIXELS", 1000)
    assert np.array_equal(decode_pixels(data, SIZE, "photo"), whole)


def test_a_large_transparent_photo_takes_little_more_than_its_own_pixels(tmp_path):
    Image.new("RGBA", (6000, 6000)).save(tmp_path / "large.png", compress_level=1)
    program = (
        "import resource; from pathlib import Path; from fedmpt.edge_client.images import load_pixels;"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10; before = peak();"
        "load_pixels(Path('large.png'), 224); print(peak() - before)"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, check=True)
    decoded = 6000 * 6000 * 4 >> 20
    assert int(run.stdout) < 1.5 * decoded


def test_photos_that_would_fill_the_memory_together_wait_for_each_other():
    data = encoded(picture())
    with ThreadPoolExecutor(1) as pool:
        with images._budget.take(2 * images.MAXIMUM_PIXELS):
            waiting = pool.submit(decode_pixels, data, SIZE, "photo")
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.2)
        assert waiting.result(timeout=20).shape == (SIZE, SIZE, 3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (SIZE, SIZE), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    red = decode_pixels(data, SIZE, "photo")[0, 0].astype(int)
    assert red[0] > 230
    assert red[2] < 30


def test_unicode_name_is_read(tmp_path):
    path = tmp_path / "Straße 猫 🐈.png"
    path.write_bytes(encoded(picture()))
    assert load_pixels(path, SIZE).shape == (SIZE, SIZE, 3)


def bomb():
    """A valid PNG of a few hundred kilobytes that would unpack to 1.2 gigapixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    side = 35_000
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * (side // 8 + 1) * side)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@contextlib.contextmanager
def without_root():
    """Root may read everything, so it becomes someone else for a while."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def write(folder, data):
    path = folder / "photo.jpg"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"path,labels\n", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (encoded(picture(), "JPEG")[:1500], "truncated"),
        (encoded(picture())[:1500], "damaged"),
        (encoded(picture(), "JPEG")[:20], "damaged|not an image"),
        (bomb(), "decompression bomb"),
        (encoded(Image.new("F", (9, 9)), "TIFF"), "32-bit pixels"),
        (encoded(Image.new("L", (60_000, 1))), "too elongated"),
        (b"\0\0\0\x18ftypheic" + bytes(100), "HEIC.*convert it to JPEG"),
    ],
    ids=[
        "empty",
        "text",
        "postscript",
        "cut-jpeg",
        "cut-png",
        "header-only",
        "bomb",
        "float",
        "elongated",
        "heic",
    ],
)
def test_bad_content_is_a_photo_error_that_names_file_and_reason(tmp_path, data, reason):
    path = write(tmp_path, data)
    with pytest.raises(PhotoError, match=reason) as caught:
        load_pixels(path, SIZE)
    assert str(caught.value).startswith(f"{path}: ")
    assert caught.value.path == path


@given(
    st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "AVIF", "JPEG2000"]),
    st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=8),
    st.integers(0, 2**16),
)
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("ignore")  # Pillow warns of much that is wrong
def test_any_damage_is_survived_or_a_photo_error(kind, changes, end):
    data = bytearray(encoded(picture(width=30, height=21), kind))
    for position, value in changes:
        data[position % len(data)] = value
    with contextlib.suppress(PhotoError):
        assert decode_pixels(bytes(data[: end or None]), 8, "photo").shape == (8, 8, 3)


def test_pixel_limit_holds_below_pillows_own_error(tmp_path):
    # 11,000 x 11,000: above the warning, below the point where Pillow itself refuses.
    path = write(tmp_path, encoded(Image.new("1", (11_000, 11_000))))
    with pytest.raises(PhotoError, match="decompression bomb"):
        load_pixels(path, SIZE)


def test_missing_file(tmp_path):
    with pytest.raises(PhotoError, match="no such file"):
        load_pixels(tmp_path / "gone.jpg", SIZE)


def test_a_name_with_a_windows_line_end_is_shown_with_it(tmp_path):
    with pytest.raises(
        PhotoError, match=r"gone\.jpg\\r: no such file; its name ends in \\r: give.*Unix line ends"
    ):
        load_pixels(tmp_path / "gone.jpg\r", SIZE)


def test_folder_in_place_of_a_photo(tmp_path):
    with pytest.raises(PhotoError, match="not a regular file"):
        load_pixels(tmp_path, SIZE)


def test_a_closed_folder_is_not_permitted():
    with (
        tempfile.TemporaryDirectory() as name
    ):  # outside of tmp_path, whose parents are closed to others as well
        Path(name).chmod(0o755)
        closed = Path(name, "closed")
        closed.mkdir(mode=0)
        with without_root(), pytest.raises(PhotoError, match="Permission denied"):
            load_pixels(closed, SIZE)


def test_pipe_in_place_of_a_photo_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "photo.jpg")
    with pytest.raises(PhotoError, match="not a regular file"):
        load_pixels(tmp_path / "photo.jpg", SIZE)


def test_symlink_loop(tmp_path):
    (tmp_path / "a.jpg").symlink_to(tmp_path / "b.jpg")
    (tmp_path / "b.jpg").symlink_to(tmp_path / "a.jpg")
    with pytest.raises(PhotoError, match="symbolic links"):
        load_pixels(tmp_path / "a.jpg", SIZE)


def test_unreadable_file(tmp_path):
    path = write(tmp_path, encoded(picture()))
    path.chmod(0)
    with without_root(), pytest.raises(PhotoError, match="Permission denied"):
        load_pixels(path, SIZE)


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"no photographs in {PHOTOS}; set FEDMPT_PHOTOS")
def test_real_photographs_equal_clips_own():
    files = sorted(PHOTOS.rglob("*.jpg"))
    assert files
    for file in files[::8]:
        assert_as_clip(file.read_bytes(), 224)
