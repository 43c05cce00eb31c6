import ast
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import beit_fast.data
from beit_fast.data import (
    ArraySource,
    BadImages,
    BlockwiseMasking,
    CropSampler,
    FolderSource,
    PretrainLoader,
    Request,
    TooManyBadImages,
    epoch_order,
    open_source,
    sample_keys,
    screen,
)
from beit_fast.data.augmentation.color_jitter import gray_means
from beit_fast.data.resizing import resize_with_dali
from beit_fast.kernels import color_jitter

GRAY = np.array([0.299, 0.587, 0.114])
MASKING = BlockwiseMasking((4, 4), 6, min_num_patches=2)
NO_VIEWS = CropSampler(scale=(1.0, 1.0), flip_probability=0.0, brightness=0.0, contrast=0.0, saturation=0.0)


def folder(root, files):
    root.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (root / name).write_bytes(data)
    return open_source(root)


@pytest.fixture
def source(tmp_path, photographs):
    return folder(tmp_path / "photographs", {f"{i}.jpg": data for i, data in enumerate(photographs)})


def make(source, requests, **options):
    options = {"seed": 7, "image_size": 64, "token_image_size": 32, "threads": 1} | options
    masking, sampling = options.pop("masking", MASKING), options.pop("views", CropSampler())
    with PretrainLoader(source, masking, sampling, **options) as views:
        return list(views.batches(requests))


def joined(batches):
    fields = ("images", "token_images", "mask", "indices", "sample_keys")
    return {field: torch.cat([getattr(batch, field) for batch in batches]) for field in fields}


def official_view(data, window, flip, factors, size, resample, jitter_first):
    """Jitter and crop with Pillow and float arithmetic; in the official order, or as here (after the resize)."""
    top, left, height, width = (int(v) for v in window)
    image = Image.open(data).convert("RGB")
    center = float((np.asarray(image).astype(np.float64) @ GRAY).mean())

    def jitter(image):
        x = np.asarray(image).astype(np.float64)
        brightness, contrast, saturation = (float(f) for f in factors)
        x = np.clip(x * brightness, 0, 255)
        middle = float((x @ GRAY).mean()) if jitter_first else np.clip(center * brightness, 0, 255)
        x = np.clip(contrast * x + (1 - contrast) * middle, 0, 255)
        x = np.clip(saturation * x + (1 - saturation) * (x @ GRAY)[..., None], 0, 255)
        return x

    if jitter_first:
        image = Image.fromarray(np.round(jitter(image)).astype(np.uint8))
    image = image.crop((left, top, left + width, top + height)).resize((size, size), resample)
    result = np.asarray(image).astype(np.float64) if jitter_first else jitter(image)
    return result[:, ::-1] if flip else result


def test_both_views_against_pillow(source):
    """Same crop, flip and colour in both sizes, normalised for the model and plain for the tokenizer."""
    sampling = CropSampler()
    positions = np.arange(8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    options = {"mean": mean, "std": std, "jitter_center": "image"}
    (batch,) = make(source, [Request(3, positions)], image_size=224, token_image_size=112, **options)
    indices = epoch_order(positions, 8, 7, 3)
    assert batch.indices.tolist() == indices.tolist()
    headers = [screen(source.read(i)) for i in indices]
    drawn = sampling.sample(7, 3, indices, [h.height for h in headers], [h.width for h in headers])
    for row, index in enumerate(indices):
        random = drawn.windows[row], drawn.flips[row], drawn.factors[row]
        image = batch.images[row].permute(1, 2, 0).double().numpy() * std + mean
        token_image = batch.token_images[row].permute(1, 2, 0).double().numpy()
        assert token_image.min() >= 0
        assert token_image.max() <= 1
        for found, size, resample in (
            (image, 224, Image.Resampling.BICUBIC),
            (token_image, 112, Image.Resampling.LANCZOS),
        ):
            levels = np.abs(found * 255 - official_view(source.name(index), *random, size, resample, False))
            assert levels.mean() < 0.3
            assert levels.max() <= 16
            order = np.abs(found * 255 - official_view(source.name(index), *random, size, resample, True))
            assert order.mean() < 3  # jitter before the crop, as in the official code, clips elsewhere


def test_contrast_about_the_view_instead_of_the_image_moves_levels_little(source):
    requests = [Request(0, np.arange(8)), Request(1, np.arange(8))]
    view = joined(make(source, requests, image_size=96))["images"]
    image = joined(make(source, requests, image_size=96, jitter_center="image"))["images"]
    levels = (view - image).abs().mean().item() * 127.5
    assert 0 < levels < 5


def test_against_the_pure_dali_graph(source):
    """The whole chain as DALI operators: decode, resize, jitter, flip, normalise."""
    from nvidia.dali import Pipeline, fn, math, types

    positions = np.arange(8)
    (batch,) = make(source, [Request(0, positions)], image_size=96, token_image_size=48)
    indices = epoch_order(positions, 8, 7, 0)
    encoded = [source.read(i) for i in indices]
    headers = [screen(data) for data in encoded]
    views = CropSampler().sample(7, 0, indices, [h.height for h in headers], [h.width for h in headers])

    pipe = Pipeline(batch_size=8, num_threads=1, device_id=None)
    with pipe:

        def feed(values, dtype, ndim=0):
            return fn.external_source(source=lambda _: values, dtype=dtype, ndim=ndim)

        window = [w.astype(np.int32) for w in views.windows]
        crops = fn.decoders.image_slice(
            feed([np.frombuffer(data, np.uint8) for data in encoded], types.UINT8, 1),
            start=feed([w[:2] for w in window], types.INT32, 1),
            shape=feed([w[2:] for w in window], types.INT32, 1),
            axes=(0, 1),
        )
        brightness, contrast, saturation = (feed(list(f), types.FLOAT) for f in views.factors.T.copy())
        resized = resize_with_dali(crops, 96, 48)
        gray = fn.color_space_conversion(
            fn.cast(resized[0], dtype=types.UINT8), image_type=types.RGB, output_type=types.GRAY
        )
        center = math.clamp(fn.reductions.mean(gray) * brightness, 0.0, 255.0)
        outputs = []
        for image in resized:
            x = math.clamp(fn.cast(image, dtype=types.FLOAT) * brightness, 0.0, 255.0)
            x = math.clamp(center + (x - center) * contrast, 0.0, 255.0)
            x = math.clamp(fn.saturation(x, saturation=saturation, dtype=types.FLOAT), 0.0, 255.0)
            flip = feed([np.int32(f) for f in views.flips], types.INT32)
            outputs.append(fn.crop_mirror_normalize(x, mirror=flip, mean=[0.0], std=[255.0]))
        pipe.set_outputs(*outputs)
    pipe.build()
    image, token_image = (np.stack([np.asarray(x) for x in output]) for output in pipe.run())
    for found, expected in ((batch.images / 2 + 0.5, image), (batch.token_images, token_image)):
        levels = np.abs(found.numpy() - expected) * 255
        assert levels.mean() < 0.5
        assert levels.max() < 24  # DALI's bicubic is off by up to 16, which brightness and contrast stretch


def test_content_does_not_depend_on_split_threads_order_or_decoder(source):
    whole = joined(make(source, [Request(2, np.arange(8))]))
    split = joined(make(source, [Request(2, np.array(p)) for p in ([0], [1, 2, 3], [4, 5], [6, 7])], threads=3))
    shuffled = np.array([5, 2, 7, 0, 1, 6, 3, 4])
    reordered = joined(make(source, [Request(2, shuffled[:3]), Request(2, shuffled[3:])], prefetch=1))
    pillow = joined(make(source, [Request(2, np.arange(8))], decoder="pil"))
    for field, values in whole.items():
        assert torch.equal(values, split[field]), field
        assert torch.equal(values[shuffled], reordered[field]), field
        assert torch.equal(values, pillow[field]), field
    assert torch.equal(whole["mask"], MASKING.sample(7, 2, whole["indices"].numpy()))
    assert torch.equal(whole["sample_keys"], sample_keys(7, 2, whole["indices"].numpy()))
    other_epoch = joined(make(source, [Request(3, np.arange(8))]))
    assert not torch.equal(whole["images"], other_epoch["images"])
    assert sorted(other_epoch["indices"].tolist()) == list(range(8))


def test_every_format_goes_through(tmp_path, good_files):
    source = folder(tmp_path / "odd", {f"{kind}.jpg": data for kind, data in good_files.items()})
    bad = BadImages(len(source))
    (batch,) = make(source, [Request(0, np.arange(len(source)))], bad_images=bad)
    assert sorted(batch.indices.tolist()) == list(range(len(source)))
    assert len(bad) == 0
    assert torch.isfinite(batch.images).all()


@pytest.mark.parametrize("decoder", ["dali", "pil"])
def test_bad_files_are_replaced_counted_and_named(tmp_path, photographs, broken_files, damaged_files, decoder):
    good = {f"good{i}.jpg": data for i, data in enumerate(photographs)}
    bad_names = {f"bad_{kind}.jpg": data for kind, data in (broken_files | damaged_files).items()}
    source = folder(tmp_path / "images", good | bad_names)
    (tmp_path / "images" / "bad_link.jpg").symlink_to(tmp_path / "nowhere")
    source = open_source(tmp_path / "images")
    length = len(source)
    assert length == len(good) + len(bad_names) + 1

    def run(split):
        bad = BadImages(length, tmp_path / f"bad_{split}.tsv", max_share=1.0)
        requests = [Request(1, part) for part in np.array_split(np.arange(length), split)]
        # The whole image: a window above the damage would decode.
        options = {"views": NO_VIEWS, "bad_images": bad, "decoder": decoder}
        return bad, joined(make(source, requests, **options))

    bad, content = run(1)
    names = {source.name(i).rsplit("/", 1)[1]: reason for i, reason in ((i, None) for i in range(length))}
    expected = {name for name in names if name.startswith("bad")}
    assert {name.rsplit("/", 1)[1] for name in bad.reasons} == expected
    lines = (tmp_path / "bad_1.tsv").read_text().splitlines()
    assert {line.split("\t")[0].rsplit("/", 1)[1] for line in lines} == expected
    assert all(len(line.split("\t")) == 2 for line in lines)

    # Each bad one gives way to the next good one of the epoch's order.
    order = epoch_order(np.arange(length), length, 7, 1).tolist()
    is_good = [source.name(i).rsplit("/", 1)[1] in good for i in order]
    for position, index in enumerate(content["indices"].tolist()):
        following = next(k for k in range(length) if is_good[(position + k) % length])
        assert index == order[(position + following) % length]

    _, again = run(9)
    assert all(torch.equal(values, again[field]) for field, values in content.items())


def test_too_many_bad_images_end_the_iteration(tmp_path, photographs, broken_files):
    files = {f"{i:02d}.jpg": photographs[i % 8] for i in range(30)}
    files |= {"40.jpg": broken_files["web_page"], "41.jpg": broken_files["jpeg_half"]}
    source = folder(tmp_path / "images", files)
    bad = BadImages(len(source), tmp_path / "bad.tsv")
    with pytest.raises(TooManyBadImages, match=r"2 of 32 images cannot be used \(allowed: 1%\)") as failure:
        make(source, [Request(0, np.arange(32))], bad_images=bad)
    assert "\n" not in str(failure.value)
    hopeless = ArraySource(np.zeros((2, 8, 8, 3), np.uint8))
    hopeless.read = lambda index: b"nothing"
    with pytest.raises(ValueError, match="not one of its images"):
        make(hopeless, [Request(0, np.arange(2))], bad_images=BadImages(2, max_share=1.0))


def test_tar_and_array_sources(tmp_path, photographs):
    import io
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i, data in enumerate(photographs):
            info = tarfile.TarInfo(f"{i}.jpg")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    decoded = [np.asarray(Image.open(io.BytesIO(data))) for data in photographs]
    from_tar = joined(make(open_source(tmp_path), [Request(0, np.arange(8))]))
    from_arrays = joined(make(ArraySource(decoded), [Request(0, np.arange(8))]))
    assert all(torch.equal(values, from_arrays[field]) for field, values in from_tar.items())


def test_torch_and_compiled_transform_agree():
    from beit_fast import _C

    rng = np.random.default_rng(0)
    crops = rng.integers(0, 256, (6, 9, 13, 3), np.uint8)
    flips = rng.random(6) < 0.5
    factors = rng.uniform(0.3, 1.7, (6, 3)).astype(np.float32)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    centers = _C.gray_means(crops)
    assert torch.allclose(gray_means(torch.from_numpy(crops)), torch.from_numpy(centers), atol=1e-3)
    ours = color_jitter(*map(torch.from_numpy, (crops, flips, factors, centers)), mean, std)
    compiled = torch.from_numpy(_C.transform_views(crops, flips, factors, centers, mean, std))
    assert torch.allclose(ours, compiled, atol=2e-5)


def test_it_works_ahead_and_stops_when_told(source):
    asked = []

    def requests():
        for step in range(1000):
            asked.append(step)
            yield Request(step, np.array([0, 1]))

    threads = threading.active_count()
    views = PretrainLoader(source, MASKING, CropSampler(), seed=0, image_size=32, token_image_size=16, prefetch=2)
    batches = views.batches(requests())
    first = next(batches)
    assert len(first) == 2
    assert len(asked) < 12
    batches.close()
    views.close()
    assert threading.active_count() == threads
    assert len(asked) < 12

    views = PretrainLoader(source, MASKING, CropSampler(), seed=0, image_size=32, token_image_size=16)
    batches = views.batches(requests())
    next(batches)
    views.close()  # under an iteration
    assert list(batches) == []
    assert threading.active_count() == threads


def test_errors_of_the_other_thread_arrive(source):
    def requests():
        yield Request(0, np.array([0]))
        yield Request(0, np.array([99]))

    with PretrainLoader(source, MASKING, CropSampler(), seed=0, image_size=32, token_image_size=16) as views:
        batches = views.batches(requests())
        next(batches)
        with pytest.raises(ValueError, match="positions"):
            next(batches)
        assert list(batches) == []


def test_wrong_arguments_are_named(source):
    for options, message in (
        ({"image_size": 30}, r"image_size 30 is not a multiple of the mask's grid \(4, 4\)"),
        ({"token_image_size": 0}, "token_image_size 0"),
        ({"prefetch": 0}, "prefetch must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"decoder": "cv2"}, "decoder must be auto, dali, dali-gpu or pil"),
        ({"decoder": "dali-gpu"}, "dali-gpu needs device cuda"),
        ({"jitter_center": "middle"}, "jitter_center"),
    ):
        with pytest.raises(ValueError, match=message):
            make(source, [], **options)
    with pytest.raises(ValueError, match="source: no images"):
        make(FolderSource(source.root, []), [])


def test_memory_does_not_grow(source):
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    requests = [Request(epoch, np.arange(8)) for epoch in range(400)]
    sizes = []
    with PretrainLoader(source, MASKING, CropSampler(), seed=0, image_size=32, token_image_size=16, threads=2) as views:
        for number, _ in enumerate(views.batches(requests)):
            if number in (99, 399):
                sizes.append(resident())
    assert sizes[1] - sizes[0] < 8e6  # 300 batches; one batch's output alone is 0.1 MB


def test_importing_the_package_imports_no_dali_and_no_pillow():
    for path in sorted(Path(beit_fast.data.__file__).parent.rglob("*.py")):
        body = ast.parse(path.read_text()).body
        names = [alias.name for node in body if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in body if isinstance(node, ast.ImportFrom)]
        assert not {name.split(".")[0] for name in names} & {"nvidia", "PIL", "torchvision", "timm"}, path.name
