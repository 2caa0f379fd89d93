"""Train the shipped pair on Fashion-MNIST: `python -m cspd.tools.demo.train target|draft OUT`.

The recipe of MAR (Li et al. 2024): random masks, a diffusion loss on the masked tokens, learned
variances, label dropping for guidance, an exponential moving average of the weights. Only this
program needs the data set; the weights it leaves are what the package ships.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cspd.engines.schedule import ScheduleSpec, make_schedule
from cspd.export.mar.model import Mar
from cspd.export.mar.presets import PRESETS
from cspd.tools.demo.fashion import load_images, to_tokens

LABEL_DROP = 0.1
TIMES_PER_TOKEN = 2
VARIANCE_WEIGHT = 0.05
SAVE_EVERY = 100


@dataclass(frozen=True)
class Recipe:
    """Settings of one training run."""

    steps: int
    batch: int = 64
    learning_rate: float = 1e-3
    warmup: int = 300
    ema: float = 0.999
    seed: int = 0


def initialise(model: Mar) -> None:
    """Weights of a fresh model: Xavier for matrices, zero for modulations and the last layer."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if "adaLN_modulation" in name or "final_layer.linear" in name:
            nn.init.zeros_(parameter)
        elif name.startswith(("class_emb", "fake_latent", "mask_token")) or "pos_embed" in name:
            nn.init.normal_(parameter, std=0.02)


def random_mask(batch: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Visible and masked positions, [B, V] and [B, L - V] int32; the share is a cosine."""
    masked = max(1, math.ceil(num_tokens * math.cos(math.pi / 2 * torch.rand(()).item())))
    order = torch.rand(batch, num_tokens).argsort(1).int()
    return order[:, masked:], order[:, :masked]


class DiffusionTrainer:
    """The training loss of the diffusion head on the full chain of training steps."""

    def __init__(self, spec: ScheduleSpec) -> None:
        schedule = make_schedule(spec, spec.last_timestep + 1)
        self.table = schedule.table
        ab = torch.from_numpy(schedule.alphas_cumprod)
        self.signal, self.noise = ab.sqrt().float(), (1 - ab).sqrt().float()

    def loss(self, model: Mar, x0: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean squared noise error and variance bound (nats) for tokens [N, C], z [N, D]."""
        step = torch.randint(len(self.table), (len(x0),))
        noise = torch.randn_like(x0)
        x = self.signal[step, None] * x0 + self.noise[step, None] * noise
        row = self.table[step].unsqueeze(1)
        predicted, variance = model.diffloss.net(x, row[:, 0, 0], z)
        predicted, variance = predicted.float(), variance.float()
        bound = self._variance_bound(x0, x, predicted.detach(), variance, row, step)
        return (predicted - noise).square().mean(), bound.mean()

    def _variance_bound(
        self, x0: Tensor, x: Tensor, noise: Tensor, variance: Tensor, row: Tensor, step: Tensor
    ) -> Tensor:
        """KL of the true posterior from the predicted kernel (step 0: negative log-likelihood)."""
        _, from_x, from_noise, mean_x0, mean_x, low, high = row.unbind(-1)
        predicted_x0 = (from_x * x - from_noise * noise).clamp(-1, 1)
        mean, true_mean = (mean_x0 * origin + mean_x * x for origin in (predicted_x0, x0))
        fraction = (variance + 1) / 2
        log_std = fraction * high + (1 - fraction) * low
        error = (true_mean - mean).square() * (-2 * log_std).exp() / 2
        spread = (2 * (low - log_std)).exp() / 2 - 0.5 - (low - log_std)
        return torch.where(step[:, None] > 0, error + spread, error + log_std - low)


def train(preset: str, spec: ScheduleSpec, recipe: Recipe, out: Path) -> None:
    """Train `preset`; leaves the averaged weights in `out`, also every `SAVE_EVERY` steps."""
    torch.manual_seed(recipe.seed)
    images, labels = load_images("train")
    tokens = to_tokens(images)
    model = Mar(PRESETS[preset])
    initialise(model)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(recipe.ema)
    )
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=0.02,
        fused=True,
    )
    diffusion = DiffusionTrainer(spec)
    sums = torch.zeros(2)
    for step in range(1, recipe.steps + 1):
        rate = recipe.learning_rate * min(step / recipe.warmup, 1 - 0.98 * step / recipe.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        index = torch.randint(len(tokens), (recipe.batch,))
        error, bound = training_step(model, diffusion, tokens[index], labels[index])
        optimizer.zero_grad()
        (error + VARIANCE_WEIGHT * bound).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)
        sums += torch.tensor([error.item(), bound.item()]) / SAVE_EVERY
        if step % SAVE_EVERY == 0:
            save(average.module, out)
            clock = time.strftime("%H:%M:%S")
            click.echo(f"{clock} {preset} step {step} mse {sums[0]:.4f} bound {sums[1]:.4f}")
            sums.zero_()
    save(average.module, out)


def training_step(
    model: Mar, diffusion: DiffusionTrainer, tokens: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Losses of one batch of `tokens` [B, L, C] with `labels` [B]."""
    batch, num_tokens, _ = tokens.shape
    visible, masked = random_mask(batch, num_tokens)
    labels = labels.where(torch.rand(batch) >= LABEL_DROP, model.config.num_classes).int()
    lengths = torch.full((batch,), visible.shape[1], dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16):
        z = model(tokens, visible, lengths, labels, masked)
        x0 = tokens.gather(1, masked.long()[..., None].expand(-1, -1, tokens.shape[-1]))
        return diffusion.loss(
            model,
            x0.flatten(0, 1).repeat(TIMES_PER_TOKEN, 1),
            z.flatten(0, 1).repeat(TIMES_PER_TOKEN, 1),
        )


def save(model: nn.Module, out: Path) -> None:
    """Write the weights in float16."""
    state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, out)


@click.command()
@click.argument("preset", type=click.Choice(["fashion-target", "fashion-draft"]))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--steps", default=6500, show_default=True)
@click.option("--threads", default=2, show_default=True)
def main(preset: str, out: Path, steps: int, threads: int) -> None:
    """Train PRESET and write its weights to OUT."""
    torch.set_num_threads(threads)
    train(preset, ScheduleSpec(clip_timesteps=950), Recipe(steps), out)


if __name__ == "__main__":
    main()
