"""`fit`: the one training loop of every arm, driven by Hugging Face Accelerate.

It stops early, writes checkpoints and goes on from the newest one when the same run is started again. All
randomness is derived from (seed, epoch, step), so a run that was cut off ends as an uninterrupted one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.nn.modules.batchnorm import _BatchNorm

from src import SetupError, checkpoint, processes
from src.average import State, WeightAverage, copied
from src.config import Config
from src.data.augment import mixing
from src.data.batches import Batches, derived_seed
from src.device import Device, halving
from src.model.attention import attention_entropy
from src.model.build import Classifier
from src.optim import L2SP, build_optimizer, class_weights, lr_at, set_lr
from src.predict import autocast, image_bar, loss_and_accuracy, one_pass

STEPS_BETWEEN_READS = 20  # losses are read from the device this often, for the bar and the finite check
DROPOUT_STREAM = 1  # tells the seeds of dropout apart from those of augmentation
SECONDS_BETWEEN_BACKUPS = 60  # a drive is slow, and an epoch of cached features takes a second
ATTENTION_IMAGES = 32  # of `holdout`, over which the entropy of attention is averaged


@dataclass(frozen=True)
class FitData:
    """What a run trains on and chooses on. `cached`: the inputs are features, not images."""

    fit: Batches
    holdout: Batches
    cached: bool = False


@dataclass
class Progress:
    """Where a run stands: all of it goes into the checkpoint. Sums are over the examples of this epoch.

    `history`: one row an epoch, counted from 1: losses, accuracies (fractions), the rate factor, and of an
    attention head its gate and the entropy of its weights. `micro_batch`: images that passed at once since
    memory ran out; 0 where it did not.
    """

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    n_correct: int = 0
    n_seen: int = 0
    epoch_seconds: float = 0.0
    history: list[dict] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    best_epoch: int = 0
    bad_epochs: int = 0
    micro_batch: int = 0


class Trainer:
    """A run in motion: model, optimizer and progress, with what it takes to save and restore them."""

    def __init__(
        self,
        model: Classifier,
        data: FitData,
        config: Config,
        device: Device,
        folder: Path,
        after_save: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self.data, self.config, self.device, self.folder = model, data, config, device, folder
        on_cpu = device.torch_device.type == "cpu"
        self.accelerator = Accelerator(mixed_precision=device.precision, cpu=on_cpu)
        require_enough_for_all(data.fit)
        if config.train.grad_checkpointing:
            recompute_activations(model)
        model.to(device.torch_device)
        forward = model.classify if data.cached else model
        self.forward = torch.compile(forward) if config.train.compile else forward
        self.optimizer = self.accelerator.prepare(build_optimizer(model, config.optim))
        n_classes = model.classifier.out_features
        self.mix = mixing(config.augment, n_classes)
        self.class_weights = self.penalty = None
        if config.optim.class_weights:
            labels_M = data.fit.labels_N[data.fit.index_M]
            self.class_weights = class_weights(labels_M, n_classes).to(device.torch_device)
        if config.optim.l2_sp:
            self.penalty = L2SP(model.backbone, config.optim.l2_sp)
        self.progress = Progress()
        self.best_state: State = {}
        self.averages = {}
        if config.train.ema_decay:
            self.averages["ema"] = WeightAverage(model.learned_state(), config.train.ema_decay)
        if config.after.soup_epochs:
            self.averages["soup"] = WeightAverage(model.learned_state())
        self.after_save, self.backed_up_at = after_save, time.monotonic()
        self.saved_at = time.monotonic()
        self.micro_batch = device.micro_batch
        payload = checkpoint.load_newest(folder)
        if payload:
            self.restore(payload)

    def save(self) -> None:
        """Write a checkpoint of this moment."""
        self.saved_at = time.monotonic()
        if not processes.is_main():
            return
        per_epoch = len(self.data.fit) + 1  # an epoch's end has a number of its own
        number = self.progress.epoch * per_epoch + self.progress.step
        checkpoint.save(self.folder, number, self.payload())
        if time.monotonic() - self.backed_up_at > SECONDS_BETWEEN_BACKUPS:
            self.after_save()
            self.backed_up_at = time.monotonic()

    def payload(self) -> dict:
        """What a checkpoint keeps."""
        return {
            "progress": asdict(self.progress),
            "model": self.model.learned_state(),
            "best": self.best_state,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
            "averages": {name: average.payload() for name, average in self.averages.items()},
        }

    def restore(self, payload: dict) -> None:
        """Go back to the moment that a checkpoint holds. `SetupError` for one of another kind of run."""
        try:
            if odd := checkpoint.difference(self.like(payload), payload, "checkpoint"):
                raise ValueError(odd)
            self.progress = Progress(**payload["progress"])
            self.model.load_state_dict(payload["model"], strict=False)
            self.optimizer.load_state_dict(payload["optimizer"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise SetupError(
                f"the newest checkpoint in {self.folder} is of another version of this program, or of "
                f"another model: {str(error)[:300]}. Delete that folder, and its snapshots if --backup keeps "
                "any, to start anew."
            ) from error
        self.micro_batch = min(self.micro_batch, self.progress.micro_batch or self.micro_batch)
        self.best_state = payload["best"]
        if self.accelerator.scaler and payload["scaler"]:  # the run may have begun on a GPU with bf16
            self.accelerator.scaler.load_state_dict(payload["scaler"])
        for name, average in self.averages.items():
            average.restore(payload["averages"][name])
        processes.say(f"resuming at epoch {self.progress.epoch + 1}, step {self.progress.step}")

    def like(self, payload: dict) -> dict:
        """This moment's payload with what only later ones have, where `payload` is of a later one."""
        ours = self.payload()
        if payload.get("best"):
            ours["best"] = ours["model"]
        if not (ours["scaler"] and payload["scaler"]):  # another GPU may have another precision
            ours["scaler"] = payload["scaler"]
        if saved := payload["optimizer"]["state"]:
            groups = self.optimizer.param_groups
            parameters = [parameter.detach() for group in groups for parameter in group["params"]]
            ours["optimizer"]["state"] = {
                number: {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
                for number, parameter in enumerate(parameters)
                if number in saved
            }
        return ours

    @property
    def finished(self) -> bool:
        """True when all epochs are done or patience ran out."""
        train, progress = self.config.train, self.progress
        return progress.epoch >= train.epochs or progress.bad_epochs >= train.patience

    def train_epoch(self) -> None:
        """The rest of the current epoch, step by step; sums stay on the device until they are read."""
        train, progress = self.config.train, self.progress
        batches = self.data.fit.at_size(self.config.size_at(progress.epoch))
        started = time.perf_counter() - progress.epoch_seconds
        unread: list[torch.Tensor] = []
        self.model.train()
        label = f"epoch {progress.epoch + 1}/{train.epochs}"
        with image_bar(batches.n_examples, label, done=progress.n_seen) as bar:
            for inputs, labels_B in batches.epoch(train.seed, progress.epoch, progress.step):
                unread.append(self.train_step(inputs, labels_B))
                progress.step += 1
                progress.n_seen += len(labels_B)
                bar.update(len(labels_B))
                if progress.step % STEPS_BETWEEN_READS == 0 or progress.step == len(batches):
                    self.read(unread)
                    unread.clear()
                    progress.epoch_seconds = time.perf_counter() - started
                    bar.set_postfix_str(f"loss {progress.loss_sum / progress.n_seen:.3f}")
                    if time.monotonic() - self.saved_at > 60 * train.checkpoint_minutes:
                        self.save()

    def train_step(
        self, inputs: torch.Tensor, labels_B: torch.Tensor, lr_factor: float | None = None
    ) -> torch.Tensor:
        """One optimizer step -> this process's (loss sum, correct, norm of the gradient) on the device.

        The rates are the schedule's, or their base times `lr_factor`. A gradient that is not finite changes
        no weight; `read` finds it. The loss is the cross-entropy; the penalty of L2-SP has a gradient and no
        place in the history.
        """
        optim, progress, n_steps = self.config.optim, self.progress, len(self.data.fit)
        if lr_factor is None:
            step = progress.epoch * n_steps + progress.step
            lr_factor = lr_at(step, self.config.train.epochs * n_steps, optim)
        set_lr(self.optimizer, lr_factor)
        sums, fitted = halving(lambda n: self.add_gradients(inputs, labels_B, n), self.micro_batch)
        if fitted < self.micro_batch:
            self.micro_batch = progress.micro_batch = fitted
        self.share_gradients()
        if self.penalty:
            self.accelerator.backward(self.penalty())
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), optim.clip_norm or math.inf)
        if not self.accelerator.scaler:  # which looks itself, and lowers its scale
            broken = ~(sums[0] + norm).isfinite()
            self.optimizer.optimizer.found_inf = broken.float()  # fused optimizers then leave all as it was
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if "ema" in self.averages:
            self.averages["ema"].update()
        return torch.cat([sums, norm.detach().double().view(1)])

    def add_gradients(self, inputs: torch.Tensor, labels_B: torch.Tensor, micro_batch: int) -> torch.Tensor:
        """Gradients of this process's share, in micro-batches -> (loss sum, correct) on the device."""
        train, progress, n_images = self.config.train, self.progress, len(labels_B)
        where = (train.seed, progress.epoch, progress.step, DROPOUT_STREAM)
        self.optimizer.zero_grad(set_to_none=True)
        seed_dropout(derived_seed(*where))
        if self.mix:
            inputs, labels_B = self.mix(inputs, labels_B)  # labels become probabilities (B,K)
        if not processes.is_main():
            seed_dropout(derived_seed(*where, processes.process_index()))
        inputs, labels_B = processes.share(inputs), processes.share(labels_B)
        sums = torch.zeros(2, dtype=torch.float64, device=self.device.torch_device)
        n_parts = -(-len(labels_B) // micro_batch)  # even parts: none is a single image
        micro_batches = (part.tensor_split(n_parts) for part in (inputs, labels_B))
        for x, y in zip(*micro_batches, strict=True):
            with autocast(self.device):
                logits_BK = self.forward(x).float()
                smoothing = self.config.optim.label_smoothing
                loss_sum = F.cross_entropy(
                    logits_BK, y, self.class_weights, label_smoothing=smoothing, reduction="sum"
                )
            self.accelerator.backward(loss_sum / n_images)
            labels = y if y.ndim == 1 else y.argmax(1)
            sums += torch.stack([loss_sum.detach(), (logits_BK.detach().argmax(1) == labels).sum()])
        return sums

    def share_gradients(self) -> None:
        """Add up what the processes found; statistics of batch normalisation become their mean."""
        if (n := processes.n_processes()) == 1:
            return
        norms = [m for m in self.model.modules() if isinstance(m, _BatchNorm) and m.training]
        statistics = [value for norm in norms for value in (norm.running_mean, norm.running_var)]
        for value in statistics:
            value.div_(n)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        processes.sum_in_place([*gradients, *statistics])

    def read(self, unread: list[torch.Tensor]) -> None:
        """Bring what the latest steps returned to the host. Raises `SetupError` for what is not finite."""
        progress = self.progress
        rows = processes.summed(torch.stack(unread)).tolist()
        for step, (loss_sum, n_correct, norm) in enumerate(rows, progress.step - len(rows) + 1):
            self.require_finite("loss", loss_sum, step)
            if not self.accelerator.scaler:
                self.require_finite("gradient", norm, step)
            progress.loss_sum += loss_sum
            progress.n_correct += int(n_correct)

    def require_finite(self, what: str, value: float, step: int) -> None:
        """Refuse to go on with NaN or infinity."""
        if not math.isfinite(value):
            raise SetupError(
                f"the {what} is {value} at epoch {self.progress.epoch + 1}, step {step}: "
                "the run stops. Try a lower `optim.lr` or a positive `optim.clip_norm`; "
                "the last checkpoint is from before."
            )

    def end_epoch(self) -> None:
        """Score `holdout`, keep the best state, add the history row, save and print one line."""
        progress, started = self.progress, time.perf_counter()
        with self.averages["ema"].in_place() if "ema" in self.averages else nullcontext():
            self.score_epoch()
        progress.seconds.append(progress.epoch_seconds + time.perf_counter() - started)
        processes.say(epoch_line(progress, self.config))
        progress.epoch += 1
        progress.step = progress.n_seen = progress.n_correct = 0
        progress.loss_sum = progress.epoch_seconds = 0.0
        self.save()

    def score_epoch(self) -> None:
        """The history row of the weights that the model has now; they are kept if they are the best."""
        train, progress = self.config.train, self.progress
        holdout = self.score_holdout()
        self.require_finite("loss of the held-out images", holdout["loss"], progress.step)
        last_step = (progress.epoch + 1) * len(self.data.fit) - 1
        progress.history.append(
            {
                "epoch": progress.epoch + 1,
                "fit_loss": progress.loss_sum / progress.n_seen,
                "fit_accuracy": progress.n_correct / progress.n_seen,
                "holdout_loss": holdout["loss"],
                "holdout_accuracy": holdout["accuracy"],
                "lr_factor": lr_at(last_step, train.epochs * len(self.data.fit), self.config.optim),
                **self.attention_state(),
            }
        )
        if "soup" in self.averages and progress.epoch >= train.epochs - self.config.after.soup_epochs:
            self.averages["soup"].update()
        if progress.epoch + 1 == best_epoch(progress.history, train.monitor):
            progress.best_epoch, progress.bad_epochs = progress.epoch + 1, 0
            self.best_state = copied(self.model.learned_state())
        else:
            progress.bad_epochs += 1

    def score_holdout(self) -> dict[str, float]:
        """Loss (cross-entropy without smoothing) and accuracy, both over rows."""
        self.model.eval()
        batches = self.data.holdout
        logits_NK = one_pass(self.forward, batches, self.device, "holdout")
        return loss_and_accuracy(logits_NK, batches.labels_N[batches.index_M])

    def attention_state(self) -> dict[str, float]:
        """`gate` and `attention_entropy` of an attention head; of several layers `gate_1`, `gate_2`, …

        The entropy is the mean over the same images of `holdout` in every epoch, taken evenly from all of it.
        """
        attention, batches = self.model.attention, self.data.holdout
        if attention is None:
            return {}
        self.model.eval()
        chosen = np.linspace(0, batches.n_examples - 1, ATTENTION_IMAGES, dtype=int)
        batches = replace(batches, index_M=batches.index_M[np.unique(chosen)])

        def entropies(inputs: torch.Tensor) -> torch.Tensor:
            map_BCHW = inputs if self.data.cached else self.model.features(inputs)
            return torch.stack([attention_entropy(w) for w in attention.weights(map_BCHW)], dim=1)

        entropies_L = one_pass(entropies, batches, self.device, "attention").mean(0, dtype=float)
        state = {}
        for layer, (gate, entropy) in enumerate(zip(attention.gates, entropies_L, strict=True), 1):
            number = f"_{layer}" if len(entropies_L) > 1 else ""
            state |= {f"gate{number}": gate.item(), f"attention_entropy{number}": float(entropy)}
        return state

    @property
    def soup(self) -> State | None:
        """Mean of the weights after the last epochs; None if not asked for or if training stopped before."""
        average = self.averages.get("soup")
        return copied(average.state) if average and average.n_updates else None


def fit(
    model: Classifier,
    data: FitData,
    config: Config,
    device: Device,
    folder: Path,
    after_save: Callable[[], None] = lambda: None,
) -> tuple[Progress, State | None]:
    """Train `model` until patience or the epochs run out and leave it with its best epoch's weights.

    Returns the progress and, where `after.soup_epochs` asks for it, the mean of the last epochs' weights.
    Resumes from the newest whole checkpoint in `folder`. Raises `SetupError` for a loss or a gradient that is
    not finite. `after_save` is called after checkpoints, but not more than once a minute.
    """
    trainer = Trainer(model, data, config, device, folder, after_save)
    while not trainer.finished:
        trainer.train_epoch()
        trainer.end_epoch()
    model.load_state_dict(trainer.best_state, strict=False)
    model.eval()
    return trainer.progress, trainer.soup


def seed_dropout(seed: int) -> None:
    """Seed the generators that dropout draws from.

    Not `torch.manual_seed`: on a machine without a GPU it files a stack trace for later at every call.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


def require_enough_for_all(batches: Batches) -> None:
    """Refuse a run whose smallest batch leaves a process without an image."""
    n, smallest = processes.n_processes(), batches.n_examples // len(batches)
    if smallest < n:
        raise SetupError(
            f"a batch of {smallest} cannot be divided over {n} processes: start fewer, "
            "or raise train.batch_size."
        )


def recompute_activations(model: Classifier) -> None:
    """Gradient checkpointing (Chen et al. 2016) in the backbone: less memory for a second forward pass."""
    if any(isinstance(module, _BatchNorm) for module in model.backbone.modules()):
        raise SetupError(
            "train.grad_checkpointing = True is for backbones without batch normalisation, whose statistics "
            "the second forward pass would count twice. Use a lower train.micro_batch instead."
        )
    model.backbone.set_grad_checkpointing()


def best_epoch(history: list[dict], monitor: str) -> int:
    """The epoch (from 1) with the lowest held-out loss or highest held-out accuracy; the first of equals."""
    if monitor == "loss":
        return min(history, key=lambda row: row["holdout_loss"])["epoch"]
    return max(history, key=lambda row: row["holdout_accuracy"])["epoch"]


def epoch_line(progress: Progress, config: Config) -> str:
    """One line for the epoch that just ended."""
    row = progress.history[-1]
    chosen_on = "holdout" if config.data.protocol == "holdout" else "valid"
    waited = f"early stopping {progress.bad_epochs} of {config.train.patience}"
    stopping = waited if progress.bad_epochs else "best so far"
    return (
        f"epoch {row['epoch']:>3}/{config.train.epochs}"
        f" | fit loss {row['fit_loss']:.4f} accuracy {row['fit_accuracy']:6.2%}"
        f" | {chosen_on} loss {row['holdout_loss']:.4f} accuracy {row['holdout_accuracy']:6.2%}"
        f" | {progress.seconds[-1]:.1f} s | {stopping}"
    )
