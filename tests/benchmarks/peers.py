"""The other side: the D-TRAK reference's way, in PyTorch, with traker and dattri."""

import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from dattri.func import projection as dattri
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.models.attention_processor import AttnProcessor
from diffusers.utils import logging
from torch.func import functional_call, grad, vmap
from trak import projectors as traker

from tests.benchmarks.workload import Adapted, Workload

logging.set_verbosity_error()
warnings.filterwarnings("ignore", module="diffusers|torch|trak|dattri")

BATCH = 52
"""Images at once, as the reference has it on CIFAR."""


def unet(work: Workload) -> UNet2DModel:
    """The same network, in evaluation mode."""
    return UNet2DModel.from_pretrained(work.folder, low_cpu_mem_usage=False).eval()


def adapted(work: Adapted) -> UNet2DConditionModel:
    """The same UNet and adapters, of which only these have gradients."""
    network = UNet2DConditionModel.from_pretrained(work.folder, low_cpu_mem_usage=False)
    network.load_lora_adapter(
        str(work.folder / "lora"), prefix="unet", use_safetensors=True
    )
    for name, parameter in network.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return network.eval()


def untrained(work: Workload) -> UNet2DModel:
    """A network like that with new weights, in training mode."""
    return UNet2DModel.from_config(UNet2DModel.load_config(work.folder)).train()


def square(prediction: torch.Tensor) -> torch.Tensor:
    """(1/d) |prediction|^2: D-TRAK."""
    return (prediction**2).mean()


def gradients(network: UNet2DModel | UNet2DConditionModel) -> Callable:
    """vmap(grad) of `square`: (x_t [B,C,H,W], t, cond [B,S,D]) -> {name: [B, ...]}.

    Of parameters that require gradients; a UNet2DModel has no cond. With the attention
    written out, as the reference has it: PyTorch has no batching rule for its fused one
    on a CPU, and is several times slower with it.
    """
    for module in network.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(AttnProcessor())
    params = {
        name: p.detach() for name, p in network.named_parameters() if p.requires_grad
    }

    def f(params, x_t, t, *cond):
        output = functional_call(
            network, params, (x_t[None], t, *(c[None] for c in cond))
        )
        return square(output.sample)

    def per_example(x_t, t, *cond):
        axes = (None, 0, None, *(0 for _ in cond))
        return vmap(grad(f), axes)(params, x_t, torch.tensor([int(t)]), *cond)

    return per_example


def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    """[B, p]"""
    return torch.cat([g.flatten(1) for g in gradients.values()], dim=1)


def features(
    gradient: Callable,
    project: Callable,
    x_t: np.ndarray,
    t: np.ndarray,
    apart: bool,
    *cond: np.ndarray,
) -> np.ndarray:
    """The reference's loop over batches and timesteps: [T, n, k] or [n, k].

    Averaged, it is the reference's own: one projection for each image. Kept apart, the
    gradients of all timesteps are projected in one call, so that the projection's
    random numbers, which each call draws anew, serve all of them.

    Args:
      gradient: see `gradients`.
      project: [B, p] -> [B, k].
      x_t: noised images [T, n, C, H, W].
      t: timesteps [T].
      apart: whether to keep the timesteps apart.
      cond: what the network is given beside them [n, ...], if anything.
    """
    results = []
    for start in range(0, x_t.shape[1], BATCH):
        rows = slice(start, start + BATCH)
        batch = torch.from_numpy(x_t[:, rows])
        given = [torch.from_numpy(c[rows]) for c in cond]
        if apart:
            every = [
                flat(gradient(x, s, *given)) for x, s in zip(batch, t, strict=True)
            ]
            projected = project(torch.cat(every))
            results.append(projected.reshape(len(t), batch.shape[1], -1))
        else:
            total = torch.zeros(())
            for x, s in zip(batch, t, strict=True):
                total = total + flat(gradient(x, s, *given))
            results.append(project(total / len(t)))
    return torch.cat(results, dim=-2).numpy()


def projections(kind: str, p: int, k: int) -> dict[str, Callable]:
    """The CPU projectors of both packages, {package: [B, p] -> [B, k]}.

    Args:
      kind: "normal" or "rademacher".
      p: length of a gradient.
      k: its length afterwards.
    """
    theirs = traker.BasicProjector(p, k, 42, kind, "cpu")
    others = dattri.BasicProjector(
        p, k, 42, dattri.ProjectionType(kind), torch.device("cpu")
    )
    return {
        # traker leaves the factor that keeps inner products to its user.
        "traker": lambda g: theirs.project(g, 0) / k**0.5,
        "dattri": lambda g: others.project(g, 0),
    }


def inverse(a: np.ndarray) -> np.ndarray:
    """Of a symmetric matrix, in its own precision."""
    return torch.linalg.inv(torch.from_numpy(a)).numpy()


def train(
    network: UNet2DModel,
    work: Workload,
    rows: Iterator[np.ndarray],
    draw: Callable = lambda step, rows, shape: (
        torch.randint(0, 1000, shape[:1]),
        torch.randn(shape),
    ),
) -> None:
    """Trains a network in place, as the reference does, on the rows of every step.

    Args:
      network: a UNet in training mode.
      work: has the images and the settings of the optimiser.
      rows: of the training images, for each step.
      draw: (step, rows, shape of the images) -> timesteps and noise.
    """
    settings = work.config.train
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=settings.learning_rate,
        betas=(settings.b1, settings.b2),
        eps=1e-8,
        weight_decay=settings.weight_decay,
    )
    warmup = int(np.ceil(settings.warmup * settings.steps))

    def rate(step):
        if step < warmup:
            return step / warmup
        progress = (step - warmup) / (settings.steps - warmup)
        return 0.5 * (1 + np.cos(np.pi * progress))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    alpha_bar = torch.from_numpy(work.schedule.alpha_bar)
    images = torch.from_numpy(np.ascontiguousarray(work.images.transpose(0, 3, 1, 2)))
    for step, at in enumerate(rows):
        x = images[at]
        t, eps = draw(step, at, x.shape)
        scale = alpha_bar[t].reshape(-1, 1, 1, 1)
        x_t = scale.sqrt() * x + (1 - scale).sqrt() * eps
        loss = torch.nn.functional.mse_loss(network(x_t, t).sample, eps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), settings.clip_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def sampler(network: UNet2DModel) -> Callable:
    """diffusers' DDIM pipeline as the reference calls it: (count, steps) -> images.

    One generator for each image; pixels in [0, 1], [count, H, W, C].
    """
    scheduler = DDIMScheduler(clip_sample=True, set_alpha_to_one=True)
    pipeline = DDIMPipeline(unet=network, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)

    def sample(count, steps):
        generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
        return pipeline(
            batch_size=count,
            generator=generators,
            num_inference_steps=steps,
            output_type="np",
        ).images

    return sample


def initial_noise(count: int, shape: tuple[int, int, int]) -> np.ndarray:
    """What `sampler` starts from [count, H, W, C]."""
    height, width, channels = shape
    noise = [
        torch.randn(
            (1, channels, height, width), generator=torch.Generator().manual_seed(seed)
        )
        for seed in range(count)
    ]
    return torch.cat(noise).permute(0, 2, 3, 1).numpy()
