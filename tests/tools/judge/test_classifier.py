from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cspd.engines.errors import CspdError
from cspd.tools.demo.fashion import DATA
from cspd.tools.judge import classifier as module
from cspd.tools.judge.classifier import Classifier, augment, embed, load_classifier, real_accuracy

SAMPLE = Path(__file__).parents[2] / "helpers" / "fashion_sample.safetensors"
SHIPPED = Path(module.__file__).parents[2] / "demo_pair" / "classifier.safetensors"


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return load_classifier()


@pytest.fixture(scope="module")
def real() -> tuple[torch.Tensor, torch.Tensor]:
    """200 real test images, class i mod 10."""
    found = load_file(SAMPLE)
    return found["images"].float() / 127.5 - 1, found["labels"].long()


def test_shipped_weights_are_small_halves():
    assert SHIPPED.stat().st_size < 1 << 20
    floats = [tensor for tensor in load_file(SHIPPED).values() if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in floats} == {torch.float16}


def test_real_images_are_recognised(classifier, real):
    images, labels = real
    correct = (classifier(images).argmax(1) == labels).sum().item()
    # 92.7 % of all test images: fewer than 172 of 200 has a probability below 0.001.
    assert correct >= 172


@pytest.mark.skipif(not DATA.exists(), reason="needs the package dataset-fashion-mnist")
def test_accuracy_on_the_whole_test_set(classifier):
    assert real_accuracy(classifier) >= 0.91


def test_features_and_logits(classifier, real):
    images, _ = real
    features = classifier.features(images[:7])
    assert features.shape == (7, 128) and features.dtype == torch.float32
    assert features.min() >= 0
    assert torch.equal(classifier.logits(features), classifier(images[:7]))


def test_prediction_does_not_depend_on_the_batch(classifier, real):
    images, _ = real
    together = classifier.features(images[:8])
    alone = torch.cat([classifier.features(image[None]) for image in images[:8]])
    assert torch.allclose(together, alone, atol=1e-4)


def test_embedding_in_chunks(classifier, real, monkeypatch):
    images, _ = real
    monkeypatch.setattr(module, "CHUNK", 3)
    assert torch.allclose(embed(classifier, images[:8]), classifier.features(images[:8]), atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 3, 28, 28), (2, 1, 32, 32), (2, 28, 28)])
def test_other_shapes_are_refused(classifier, shape):
    with pytest.raises(CspdError, match=r"expected \[N, 1, 28, 28\]"):
        classifier.features(torch.zeros(shape))


def test_missing_damaged_and_foreign_weights(tmp_path):
    (tmp_path / "damaged").write_bytes(SHIPPED.read_bytes()[:1000])
    save_file({"weight": torch.zeros(2)}, tmp_path / "foreign")
    for name in ("missing", "damaged", "foreign"):
        with pytest.raises(CspdError, match=f"{name}: not the weights of the classifier"):
            load_classifier(tmp_path / name)


def test_augmentation_moves_and_mirrors():
    torch.manual_seed(0)
    images = torch.full((400, 1, 28, 28), -1.0)
    images[:, :, 10, 5] = 1.0
    moved = augment(images)
    assert moved.shape == images.shape
    rows, columns = (index for index in moved[:, 0].eq(1).nonzero()[:, 1:].T)
    assert len(rows) == 400 and len(rows.unique()) == 1
    assert abs(rows[0] - 10) <= 2
    # Column 5 and its mirror image 22, both moved by the same amount.
    assert len(columns.unique()) == 2 and columns.max() - columns.min() == 17
    assert 140 < (columns == columns.min()).sum() < 260


def test_training_lowers_the_loss(real):
    torch.manual_seed(0)
    images, labels = real
    model = Classifier().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = [
        module._training_step(model, images[:100], labels[:100], optimizer) for _ in range(12)
    ]
    assert losses[-1] < 0.5 * losses[0]
