import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from beit_fast.data.reading import read_screened
from beit_fast.data.screening import BadImages, Header, Rejection, TooManyBadImages, screen
from beit_fast.data.sources import FolderSource


def test_good_files_pass_with_the_size_that_pillow_sees(good_files):
    for kind, data in good_files.items():
        header = screen(data)
        assert isinstance(header, Header), (kind, header)
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        assert (header.width, header.height) == image.size, kind
        assert header.format in kind or kind in ("pgm", "ppm", "one_pixel", "panorama")
        if "orientation" in kind:
            assert header.orientation == int(kind[-1])


def test_broken_files_are_refused_with_a_reason(broken_files):
    assert len(broken_files) >= 20
    for kind, data in broken_files.items():
        verdict = screen(data)
        assert isinstance(verdict, Rejection), kind
        assert verdict.reason
        assert "\n" not in verdict.reason


def test_reasons_say_what_is_wrong(broken_files):
    for kind, words in {
        "empty": "empty file",
        "web_page": "a web page",
        "gif": "GIF is not supported",
        "avif": "AVIF is not supported",
        "jpeg_half": "cut off",
        "jpeg_cut_behind_its_thumbnail": "cut off",
        "jpeg_144_megapixels": "12000 x 12000 = 144 megapixels",
        "jpeg_lossless": "unsupported coding",
        "webp_animated": "animated",
        "numpy_file": "array that cannot be read",
    }.items():
        assert words in screen(broken_files[kind]).reason, kind


def test_damage_inside_is_left_to_the_decoder(damaged_files):
    for kind, data in damaged_files.items():
        assert isinstance(screen(data), Header), kind


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_cut_and_no_flipped_byte_raises(good_files, data):
    original = good_files[data.draw(st.sampled_from(sorted(good_files)))]
    content = bytearray(original)
    for _ in range(data.draw(st.integers(0, 6))):
        content[data.draw(st.integers(0, min(len(content), 700) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(content)))
    verdict = screen(bytes(content[:end]))
    if isinstance(verdict, Header):
        assert verdict.height > 0
        assert verdict.width > 0


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=200), magic=st.sampled_from([b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF", b"BM"]))
def test_no_garbage_behind_a_magic_raises(content, magic):
    screen(magic + content)


def test_what_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    verdict = read_screened(FolderSource(tmp_path, ["gone.jpg"]), 0)
    assert isinstance(verdict, Rejection)
    assert verdict.reason == "cannot be read: No such file or directory"


def test_bad_images_are_counted_once_and_written_down(tmp_path, caplog):
    bad = BadImages(10_000, tmp_path / "bad_files.tsv")
    for name in ("a.jpg", "b\tc.jpg", "a.jpg"):
        bad.looked_at(100)
        bad.add(name, "empty file")
    assert len(bad) == 2
    assert bad.reasons == {"a.jpg": "empty file", "b\tc.jpg": "empty file"}
    assert (tmp_path / "bad_files.tsv").read_text() == "a.jpg\tempty file\nb c.jpg\tempty file\n"
    assert [record.message for record in caplog.records] == [
        "bad image replaced: a.jpg (empty file)",
        "bad image replaced: b\tc.jpg (empty file)",
    ]
    resumed = BadImages(10_000, tmp_path / "bad_files.tsv")
    counts = [len(resumed)]
    for name in ("a.jpg", "b\tc.jpg", "d.jpg"):
        resumed.add(name, "cut off")
        counts.append(len(resumed))
    assert counts == [2, 2, 2, 3], "it counts backwards after a resume"
    assert (tmp_path / "bad_files.tsv").read_text().count("\n") == 3


def test_one_percent_is_allowed_and_more_is_not(tmp_path):
    bad = BadImages(1000, tmp_path / "bad.tsv")
    for number in range(10):
        bad.looked_at(100)
        bad.add(f"{number}.jpg", "empty file")
    with pytest.raises(TooManyBadImages, match=r"11 of 1000 images cannot be used .*0\.jpg \(empty file\).*bad\.tsv"):
        bad.add("10.jpg", "empty file")
    assert (tmp_path / "bad.tsv").read_text().count("\n") == 11


def test_one_bad_image_of_few_is_allowed():
    bad = BadImages(20)
    bad.add("a", "x")
    with pytest.raises(TooManyBadImages):
        bad.add("b", "x")


def test_a_wrong_folder_is_noticed_early():
    bad = BadImages(1_000_000)
    bad.looked_at(200)
    for number in range(16):
        bad.add(str(number), "a web page, not an image")
    with pytest.raises(TooManyBadImages, match="17 of 1000000"):
        bad.add("16", "a web page, not an image")


def test_max_share_is_checked():
    with pytest.raises(ValueError, match="max_share"):
        BadImages(10, max_share=1.5)
