"""Train a small sample model on digits and save it as its paper's repository would.

usage: python -m sample_models.train MODEL [-o CHECKPOINT] [--epochs N] [--seed N]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sample_models.digits import Digits, load_digits
from sample_models.resrep import Forgetting, compactors, without_forgotten
from sample_models.samples import SAMPLES

BATCH = 64
SHIFT = 1
"""Training images are moved by up to this many pixels."""


def accuracy(predict: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    """The share of images whose largest logit is the label's."""
    with torch.no_grad():
        return float((predict(images).argmax(1) == labels).double().mean())


def train(model: nn.Module, digits: Digits, epochs: int, seed: int) -> None:
    """Cross entropy, SGD with momentum and a one-cycle learning rate; compactors, where there are some, forget."""
    torch.manual_seed(seed)
    steps = len(digits.train_images) // BATCH
    forgetting = Forgetting(model)
    optimizer = torch.optim.SGD(forgetting.others, lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=epochs * steps)
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(len(digits.train_images))
        total = 0.0
        for step in range(steps):
            picked = order[step * BATCH : (step + 1) * BATCH]
            loss = F.cross_entropy(
                model(_moved(digits.train_images[picked])), digits.train_labels[picked], label_smoothing=0.05
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            forgetting.step(optimizer.param_groups[0]["lr"], (epoch * steps + step) / (epochs * steps))
            schedule.step()
            total += float(loss.detach())
        if epoch % 10 == 9 or epoch + 1 == epochs:
            model.eval()
            score = accuracy(model, digits.test_images, digits.test_labels)
            print(f"epoch {epoch + 1:3d}  loss {total / steps:.4f}  test accuracy {score:.2%}", flush=True)


def report_forgotten(model: nn.Module, digits: Digits) -> None:
    """How many channels ResRep's training has given up, and what they were worth."""
    rows = [compactor.forgotten() for compactor in compactors(model).values()]
    whole, pruned = (accuracy(each, digits.test_images, digits.test_labels) for each in (model, without_forgotten(model)))
    gone, total = (sum(count) for count in zip(*((int(row.sum()), len(row)) for row in rows), strict=True))
    print(f"{gone} of {total} channels forgotten; test accuracy with them {whole:.2%}, without them {pruned:.2%}")


def _moved(images: Tensor) -> Tensor:
    """Each batch moved by a random offset, the background continued."""
    down, right = (int(torch.randint(-SHIFT, SHIFT + 1, ())) for _ in range(2))
    padded = F.pad(images, (SHIFT,) * 4, mode="replicate")
    top, left, side = SHIFT + down, SHIFT + right, images.shape[2]
    return padded[:, :, top : top + side, left : left + side]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(SAMPLES))
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.perf_counter()
    torch.manual_seed(options.seed)
    sample = SAMPLES[options.model]
    epochs = options.epochs or sample.epochs
    digits, model = load_digits(sample.side), sample.build()
    train(model, digits, epochs, options.seed)
    if compactors(model.eval()):
        report_forgotten(model, digits)
    output = options.output or Path(sample.checkpoint(options.model).name)
    sample.save(model.eval(), output, epochs, options.model)
    print(f"{output}: {output.stat().st_size / 1e3:.0f} kB, trained in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
