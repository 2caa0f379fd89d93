"""A small Fashion-MNIST classifier that judges samples: `cspd.tools.judge.classifier train`.

It says whether an image shows the class that was asked for, and its last hidden layer is the space
in which distances between sets of images are measured. It has nothing to do with Inception.
"""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

import click
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from cspd.engines.errors import CspdError
from cspd.export.pairs import FASHION_CLASSES
from cspd.tools.demo.fashion import load_images

FEATURES = 128
SIDE = 28
CHUNK = 500  # images per forward pass: bounds the memory of the first layer to about 50 MB
BATCH = 128
PEAK_RATE = 4e-3
MAX_SHIFT = 2


class Classifier(nn.Module):
    """Convolutional network from grey images of 28x28 pixels to 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *_convolution(1, 32),
            nn.MaxPool2d(2),
            *_convolution(32, 64),
            *_convolution(64, 64),
            nn.MaxPool2d(2),
            *_convolution(64, 128),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(128 * 9, FEATURES),
        )
        self.head = nn.Linear(FEATURES, len(FASHION_CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, 10] of `images` [N, 1, 28, 28] in [-1, 1]."""
        return self.logits(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """Last hidden layer [N, 128], non-negative, of `images` [N, 1, 28, 28] in [-1, 1].

        Raises CspdError for images of another shape.
        """
        if images.shape[1:] != (1, SIDE, SIDE):
            raise CspdError(
                f"classifier: images are {list(images.shape)}, expected [N, 1, {SIDE}, {SIDE}]"
            )
        return F.relu(self.trunk(images))

    def logits(self, features: Tensor) -> Tensor:
        """Logits [N, 10] of `features` [N, 128]."""
        return self.head(features)


def _convolution(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)


def load_classifier(path: Path | None = None) -> Classifier:
    """The classifier with the weights of `path`, by default the shipped ones; float32, frozen.

    Raises CspdError if the file is missing, unreadable or holds something else.
    """
    if path is None:
        with as_file(files("cspd.demo_pair") / "classifier.safetensors") as shipped:
            return load_classifier(shipped)
    try:
        state = {name: tensor.float() for name, tensor in load_file(path).items()}
        classifier = Classifier()
        classifier.load_state_dict(state)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CspdError(
            f"{path}: not the weights of the classifier ({str(error).splitlines()[0]}); "
            "make them with: python -m cspd.tools.judge.classifier train OUT"
        ) from error
    return classifier.eval().requires_grad_(False)


@torch.inference_mode()
def embed(classifier: Classifier, images: Tensor) -> Tensor:
    """Features [N, 128] of `images` [N, 1, 28, 28] in [-1, 1], computed in chunks."""
    return torch.cat([classifier.features(chunk) for chunk in images.split(CHUNK)])


def augment(images: Tensor) -> Tensor:
    """`images` [N, 1, H, W], half of them mirrored, all moved together by up to 2 pixels."""
    mirrored = torch.rand(len(images), 1, 1, 1) < 0.5
    images = torch.where(mirrored, images.flip(-1), images)
    top, left = torch.randint(2 * MAX_SHIFT + 1, (2,)).tolist()
    height, width = images.shape[2:]
    padded = F.pad(images, [MAX_SHIFT] * 4, value=-1.0)
    return padded[:, :, top : top + height, left : left + width]


def train(epochs: int, seed: int = 0) -> Classifier:
    """A classifier trained on the real training set, in eval mode."""
    torch.manual_seed(seed)
    images, labels = load_images("train")
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=0.02)
    steps = len(images) // BATCH * epochs
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps)
    for epoch in range(epochs):
        total = 0.0
        for index in torch.randperm(len(images)).split(BATCH)[: steps // epochs]:
            total += _training_step(model, augment(images[index]), labels[index], optimizer)
            rates.step()
        click.echo(f"epoch {epoch + 1}/{epochs} loss {total * epochs / steps:.4f}", err=True)
    return model.eval()


def _training_step(
    model: Classifier, images: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer
) -> float:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images.contiguous(memory_format=torch.channels_last))
    loss = F.cross_entropy(logits.float(), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def real_accuracy(classifier: Classifier) -> float:
    """Share of the 10,000 real test images that are classified correctly."""
    images, labels = load_images("t10k")
    predicted = classifier.logits(embed(classifier, images)).argmax(1)
    return (predicted == labels).double().mean().item()


@click.group()
def main() -> None:
    """Train or check the classifier that judges the samples of the shipped pair."""


@main.command("train")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--epochs", default=12, show_default=True, type=click.IntRange(min=1))
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=1, show_default=True, type=click.IntRange(min=1))
def train_command(out: Path, epochs: int, seed: int, threads: int) -> None:
    """Train on the real training set and write float16 weights to OUT."""
    torch.set_num_threads(threads)
    state = train(epochs, seed).state_dict()
    # Counters of batch norm, of no use after training, cannot be halved and stay integers.
    halved = {
        name: tensor.half().contiguous() if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }
    save_file(halved, out)
    click.echo(f"{out}: accuracy on the real test set {real_accuracy(load_classifier(out)):.4f}")


@main.command("check")
@click.argument("weights", required=False, type=click.Path(path_type=Path))
def check_command(weights: Path | None) -> None:
    """Accuracy of WEIGHTS, by default the shipped ones, on the real test set."""
    click.echo(f"{real_accuracy(load_classifier(weights)):.4f}")


if __name__ == "__main__":
    main()
