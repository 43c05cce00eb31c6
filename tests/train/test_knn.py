"""k-NN accuracy against scikit-learn, and features against timm's blocks."""

import numpy as np
import pytest
import torch

from beit_fast.models import Beit, BeitConfig
from beit_fast.train.evaluation.knn import image_features, knn_accuracy, probe_accuracy


def points(count, seed, classes=4, width=6):
    """Noisy directions: (count, width) and the class of each."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, classes, (count,), generator=generator)
    scale = 0.5 + torch.rand(count, 1, generator=generator)
    return scale * (centres[labels] + 1.2 * torch.randn(count, width, generator=generator)), labels


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.07), (20, 1.0), (500, 0.07)])
def test_a_vote_is_that_of_scikit_learn(k, temperature):
    neighbors = pytest.importorskip("sklearn.neighbors")
    (train, train_labels), (images, labels) = points(200, 0), points(90, 1)
    peer = neighbors.KNeighborsClassifier(
        n_neighbors=min(k, 200), metric="cosine", algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / temperature),
    )  # fmt: skip
    peer.fit(train.double().numpy(), train_labels.numpy())
    expected = 100 * float((peer.predict(images.double().numpy()) == labels.numpy()).mean())
    top1, top5 = knn_accuracy(train, train_labels, images, labels, 4, k, temperature)
    assert top1 == pytest.approx(expected, abs=1e-4)
    assert 30 < top1 < 100
    assert top5 == 100  # of four classes


def test_many_images_are_voted_on_in_parts(monkeypatch):
    (train, train_labels), (images, labels) = points(100, 0), points(50, 1)
    whole = knn_accuracy(train, train_labels, images, labels, 4)
    monkeypatch.setattr("beit_fast.train.evaluation.knn.CHUNK", 7)
    assert knn_accuracy(train, train_labels, images, labels, 4) == whole


@pytest.mark.parametrize("block", [0, -1])
def test_features_are_tokens_after_a_block(block):
    torch.manual_seed(0)
    config = BeitConfig(width=48, depth=2, num_heads=3, patch_size=8, image_size=32, init_std=0.3)
    model = Beit(config.for_classification(0, global_pool="token")).eval()
    images = torch.randn(2, 3, 32, 32)
    outputs = []
    model.blocks[block].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        model(images)
        tokens = model.norm(outputs[0] if isinstance(outputs[0], torch.Tensor) else outputs[0][0])
        found = {kind: image_features(model, images, kind, block) for kind in ("cls", "mean", "patches")}
    torch.testing.assert_close(found["cls"], tokens[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found["mean"], tokens[:, 1:].mean(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(found["patches"], tokens[:, 1:], atol=1e-5, rtol=0)


def test_the_probe_is_sklearn_s_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    (train, train_labels), (images, labels) = points(200, 0), points(100, 1)
    mean, std = train.double().mean(0), train.double().std(0, correction=0)
    x, y = (((part.double() - mean) / std).numpy() for part in (train, images))
    # sklearn weighs the sum of losses by C against half the squares; ours the mean against decay / 2
    peer = LogisticRegression(C=1 / (1e-2 * len(x)), max_iter=2000, tol=1e-8).fit(x, train_labels.numpy())
    expected = 100 * float((peer.predict(y) == labels.numpy()).mean())
    found = probe_accuracy(train, train_labels, images, labels, 4, decay=1e-2)
    assert found == pytest.approx(expected, abs=1.01)  # at most one image on the border
    assert found == probe_accuracy(train, train_labels, images, labels, 4, decay=1e-2)
    assert 30 < found < 100
