import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beit_fast.data import builtin, scenes


def _luminance(images):
    return np.stack(images).astype(np.float64) @ [0.299, 0.587, 0.114]


def test_an_image_is_a_function_of_seed_and_index_alone():
    first = [builtin.render(i, 0, 48) for i in range(20)]
    again = [builtin.render(i, 0, 48) for i in reversed(range(20))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert first[0].dtype == np.uint8
    assert first[0].shape == (48, 48, 3)
    assert len({image.tobytes() for image in first}) == 20
    held_out = {builtin.render(i, 1, 48).tobytes() for i in range(20)}
    assert held_out.isdisjoint(image.tobytes() for image in first)


def test_a_scene_looks_the_same_at_every_resolution():
    small = scenes.draw_scene(scenes.generator(0, 5), 64)[0]
    large = Image.fromarray(scenes.draw_scene(scenes.generator(0, 5), 256)[0]).resize((64, 64), Image.Resampling.BOX)
    assert np.abs(small.astype(int) - np.asarray(large).astype(int)).mean() < 8


def test_scenes_have_natural_image_statistics():
    images = _luminance([scenes.draw_scene(scenes.generator(0, i), 128)[0] for i in range(48)])
    spectrum = (np.abs(np.fft.fft2(images - images.mean((1, 2), keepdims=True))) ** 2).mean(0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(128) * 128, np.fft.fftfreq(128) * 128))
    rings = np.arange(2, 33)
    power = [spectrum[(frequency >= r) & (frequency < r + 1)].mean() for r in rings]
    slope = np.polyfit(np.log(rings + 0.5), np.log(power), 1)[0]
    assert -3.2 < slope < -1.4  # photographs: about -2
    steps = np.diff(images, axis=2).ravel()
    assert np.mean(steps**4) / np.mean(steps**2) ** 2 > 6  # sparse edges; a Gaussian has 3


def test_no_scene_has_a_flat_background():
    for i in range(24):
        luminance = _luminance([scenes.draw_scene(scenes.generator(0, i), 64)[0]])[0]
        blocks = luminance.reshape(4, 16, 4, 16).std(axis=(1, 3))
        assert np.median(blocks) > 15, i


def test_scenes_vary_in_luminance_more_than_in_colour():
    pixels = np.stack([scenes.draw_scene(scenes.generator(0, i), 64)[0] for i in range(24)]).astype(np.float64)
    luminance = pixels @ [0.299, 0.587, 0.114]
    chroma = np.concatenate([(pixels[..., 0] - luminance).ravel(), (pixels[..., 2] - luminance).ravel()])
    assert luminance.std() > 5 * chroma.std()


def test_shapes_are_distances_of_closed_outlines():
    axis = np.linspace(-1.4, 1.4, 281, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    for shape in scenes.SHAPES:
        distance = shape(x, y)
        assert distance.dtype == np.float32
        assert 0.1 < (distance < 0).mean() < 0.4, shape.__name__
        assert (distance[[0, -1]] > 0).all()
        assert (distance[:, [0, -1]] > 0).all()
        down, across = np.gradient(distance, axis[1] - axis[0])
        assert np.quantile(np.hypot(down, across), 0.99) < 1.1, shape.__name__  # never steeper than a distance


def test_every_class_is_drawn_and_known_without_drawing():
    labels = [scenes.labelled_class(i, 3) for i in range(2000)]
    counts = np.bincount(labels, minlength=scenes.NUM_CLASSES)
    assert counts.min() > 50
    assert counts.max() < 120
    assert [scenes.render_labelled(i, 3, 32)[1] for i in range(30)] == labels[:30]


def test_the_cache_is_filled_once_completed_and_extended(tmp_path, capfd):
    source = builtin.builtin_source(tmp_path, 60, size=32)
    assert len(source) == 60
    assert "60/60" in capfd.readouterr().err
    decoded = np.asarray(Image.open(source.name(7)))
    assert np.abs(decoded.astype(int) - builtin.render(7, 0, 32)).mean() < 12
    before = {i: source.read(i) for i in range(60)}

    again = builtin.builtin_source(tmp_path, 60, size=32)
    assert capfd.readouterr().err == ""
    assert [again.read(i) for i in range(60)] == list(before.values())

    Path(source.name(3)).write_bytes(b"")
    Path(source.name(4)).write_bytes(before[4][:-20])
    Path(source.name(5)).unlink()
    Path(source.name(6)).write_bytes(b"<html>" + before[6])
    repaired = builtin.builtin_source(tmp_path, 70, size=32)
    assert [repaired.read(i) for i in range(60)] == list(before.values())
    assert len(repaired) == 70
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_foreign_folder_is_refused(tmp_path):
    source = builtin.builtin_source(tmp_path, 1, size=16)
    manifest = source.root / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"renderer": "dead-leaves-0"}))
    with pytest.raises(ValueError, match=r"delete the folder"):
        builtin.builtin_source(tmp_path, 1, size=16)
    manifest.write_text("{")
    with pytest.raises(ValueError, match=r"delete the folder"):
        builtin.builtin_source(tmp_path, 1, size=16)
    manifest.unlink()
    with pytest.raises(ValueError, match=r"no manifest"):
        builtin.builtin_source(tmp_path, 1, size=16)
    with pytest.raises(ValueError, match=r"count >= 1"):
        builtin.builtin_source(tmp_path, 0, size=16)


def test_several_processes_fill_one_cache(tmp_path):
    """Another process (with a helper of its own) and this one at once."""
    code = "import sys; from beit_fast.data.builtin import *; builtin_source(sys.argv[1], 40, size=16, workers=2)"
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    while not list(tmp_path.rglob(".lock")):
        assert other.poll() in (None, 0)
        time.sleep(0.02)
    source = builtin.builtin_source(tmp_path, 44, size=16)
    assert other.wait(timeout=600) == 0
    assert len(list(tmp_path.rglob("*.jpg"))) == 44
    alone = builtin.builtin_source(tmp_path / "alone", 44, size=16)
    assert [source.read(i) for i in range(44)] == [alone.read(i) for i in range(44)]


def test_labelled_set(tmp_path):
    source = builtin.builtin_source(tmp_path, 5, seed=2, size=16, labelled=True)
    assert [source.label(i) for i in range(5)] == [scenes.labelled_class(i, 2) for i in range(5)]


def test_hues_are_what_a_mean_colour_tells(tmp_path):
    """Red and blue of the object's middle, less the brightness, point where the class says; shape and light do not."""
    found = [scenes.render_scene(index, 3, 64, scenes.HUED) for index in range(200)]
    plain = [scenes.render_scene(index, 3, 64) for index in range(200)]
    directions = list(scenes.HUES.values())
    right = []
    for scene, grey in zip(found, plain, strict=True):
        assert np.array_equal(scene.surfaces, grey.surfaces)
        assert scene.number // 4 == grey.number // 4
        red, green, blue = scene.pixels[scene.surfaces > len(scenes.SHAPES)].mean(0)
        luminance = 0.299 * red + 0.587 * green + 0.114 * blue
        right.append((np.sign(red - luminance), np.sign(blue - luminance)) == directions[scene.number % 4])
    assert np.mean(right) > 0.95
    assert [scenes.labelled_class(index, 3, scenes.HUED) for index in range(200)] == [s.number for s in found]
    source = builtin.builtin_source(tmp_path, 5, seed=3, size=16, labelled=True, hues=True)
    assert [source.label(index) for index in range(5)] == [s.number for s in found[:5]]
    for wrong in ({"hues": True}, {"hues": True, "labelled": True, "label_maps": True}):
        with pytest.raises(ValueError, match="hues"):
            builtin.builtin_source(tmp_path, 1, **wrong)


def test_the_photographs_are_small_and_attributed():
    folder = Path(builtin.__file__).parent / "photographs"
    attribution = (folder / "ATTRIBUTION.md").read_text()
    files = sorted(folder.glob("*.jpg"))
    assert [file.stem for file in files] == sorted(builtin.PHOTOGRAPHS)
    assert sum(file.stat().st_size for file in files) < 1_000_000
    assert all(f"`{file.name}`" in attribution for file in files)
