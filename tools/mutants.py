"""`python -m tools.mutants`: break the code in one place after another, and see tests fail.

Each mutant is put into a temporary copy of the repository. One of the few tests named beside it must fail
there; all of them pass where nothing is broken. `-k TEXT` selects by name, `-j 2` works on two at a time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 300  # for the tests of one mutant; the unbroken code gets as much for each test
PYTEST = ("-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0")
# What the tests import of others; it takes longer than most of them.
SLOW_TO_IMPORT = (
    *("accelerate", "huggingface_hub", "pandas", "pytest", "safetensors.torch", "scipy.stats"),
    *("sklearn.metrics", "statsmodels.stats.proportion", "timm", "torch", "torchvision.transforms.v2"),
)


@dataclass(frozen=True)
class Mutant:
    """A fault in plain words: `old`, which `file` has once, becomes `new`; one of `tests` must notice.

    `tests`: pytest's node ids.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def applied_to(self, text: str) -> str:
        """The file's text, broken. Raises `ValueError` unless it has `old` exactly once."""
        if (n := text.count(self.old)) != 1:
            raise ValueError(f"{self.file} has {n} times what {self.name!r} changes: {self.old!r}")
        return text.replace(self.old, self.new)


CUT_OFF = "tests/test_train.py::test_a_run_cut_off_anywhere_ends_as_one_that_was_not"
EVERYTHING = "tests/test_train.py::test_everything_at_once_cut_off_and_resumed"
MIXED = "tests/test_train.py::test_parts_of_a_mixed_weighted_and_penalised_step_are_the_whole_batch"
NUMBERS = "tests/torture/test_torture_numbers.py"
DRIVE = "tests/torture/test_torture_drive.py"
LAYOUTS = "tests/torture/test_torture_layouts.py"
ARCHIVES = "tests/torture/test_torture_archives.py"
AGREE = "tests/torture/test_torture_processes.py::test_processes_agree[improvement, mixed, penalty]"

MUTANTS = (
    # -------------------------------------------------------------------------- files and checkpoints
    Mutant(
        "files are written in their place",
        "src/files.py",
        "        write(partial)\n        flush(partial)\n        os.replace(partial, path)\n",
        "        write(path)\n        flush(path)\n",
        ("tests/test_checkpoint.py::test_a_failing_write_leaves_the_old_file_and_no_partial",),
    ),
    Mutant(
        "files take their place before they are on the disk",
        "src/files.py",
        "        flush(partial)\n",
        "",
        ("tests/test_checkpoint.py::test_the_file_is_on_disk_before_it_takes_its_place",),
    ),
    Mutant(
        "a file's name is not brought to the disk",
        "src/files.py",
        "            flush(path.parent)\n",
        "            pass\n",
        ("tests/test_checkpoint.py::test_the_file_is_on_disk_before_it_takes_its_place",),
    ),
    Mutant(
        "a carriage return is not quoted in a CSV",
        "src/files.py",
        'csv.QUOTE_NONNUMERIC if any("\\r" in str(text) for text in texts) else csv.QUOTE_MINIMAL',
        "csv.QUOTE_MINIMAL",
        ("tests/torture/test_torture_names.py::test_each_odd_cell_comes_back_at_each_place[0]",),
    ),
    Mutant(
        "a checkpoint's hash is not compared",
        "src/checkpoint.py",
        "if expected != found:",
        "if not found:",
        ("tests/test_checkpoint.py::test_damaged_newest_is_named_and_the_one_before_it_used[flipped]",),
    ),
    Mutant(
        "a checkpoint may run code",
        "src/checkpoint.py",
        "weights_only=True",
        "weights_only=False",
        ("tests/test_checkpoint.py::test_loading_runs_no_code",),
    ),
    Mutant(
        "one checkpoint is kept",
        "src/checkpoint.py",
        "kept = (path.stem, _newest_whole_before(path))",
        "kept = (path.stem,)",
        ("tests/test_checkpoint.py::test_round_trip_and_two_generations",),
    ),
    Mutant(
        "the newest checkpoint is the one with the latest time",
        "src/checkpoint.py",
        "sorted(stems, reverse=True)",
        "sorted(\n        stems,\n"
        "        key=lambda stem: max(path.stat().st_mtime for path in folder.glob(f'{stem}.*')),\n"
        "        reverse=True,\n    )",
        ("tests/torture/test_torture_checkpoints.py::test_damaged_is_named_and_the_one_before_it_used",),
    ),
    # ------------------------------------------------------------------------ images and their labels
    Mutant(
        "a download is not verified",
        "src/data/download.py",
        "if have != (size or have) or found != checksum:",
        "if have != (size or have):",
        ("tests/test_sources.py::test_wrong_md5_removes_the_file",),
    ),
    Mutant(
        "parts of two versions are joined",
        "src/data/download.py",
        "if at and known_tag and tag and tag != known_tag:",
        "if at and known_tag and not tag:",
        ("tests/torture/test_torture_downloads.py::test_parts_of_two_versions_are_never_joined",),
    ),
    Mutant(
        "images are shrunk without antialiasing",
        "src/data/store.py",
        "Image.Resampling.BICUBIC",
        "Image.Resampling.NEAREST",
        ("tests/test_store.py::test_resize_is_antialiased_bicubic",),
    ),
    Mutant(
        "what is transparent is black",
        "src/data/store.py",
        '"white"',
        '"black"',
        ("tests/torture/test_torture_images.py::test_pixels_are_those_that_were_written[png_cases]",),
    ),
    Mutant(
        "photographs lie on their side",
        "src/data/store.py",
        "        ImageOps.exif_transpose(image, in_place=True)\n",
        "",
        ("tests/torture/test_torture_images.py::test_pixels_are_those_that_were_written[turned_cases]",),
    ),
    Mutant(
        "an image that cannot be read is black",
        "src/data/store.py",
        """bad[i] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
                continue
""",
        "pixels_HWC = np.zeros((size, size, 3), np.uint8)\n",
        ("tests/test_store.py::test_unreadable_images_are_all_named",),
    ),
    Mutant(
        "after an image that is left out, labels are those of the one before",
        "src/data/store.py",
        "[examples[i] for i in keep], digests_N[keep]",
        "examples[: len(keep)], digests_N[keep]",
        ("tests/test_store.py::test_skip_bad_leaves_them_out_and_lists_them",),
    ),
    Mutant(
        "a store's rows are not compared with its manifest",
        "src/data/store.py",
        'if found != manifest["sha256"]:',
        "if not found:",
        ("tests/test_store.py::test_damaged_store_is_built_again[manifest of other data]",),
    ),
    Mutant(
        "a store of files that have changed since is taken",
        "src/data/sources/trees.py",
        "return status.st_size, status.st_mtime_ns",
        "return status.st_size, 0",
        ("tests/test_store.py::test_another_size_or_changed_source_is_another_store",),
    ),
    Mutant(
        "a zip's member may say that it is larger than any image",
        "src/data/sources/tiny_imagenet.py",
        "            check_size(info.file_size)\n",
        "",
        ("tests/test_sources.py::test_oversized_member_is_refused_unread",),
    ),
    Mutant(
        "an image that has two labels gets the second",
        "src/data/sources/listed.py",
        "if image in labels:",
        "if not image:",
        ("tests/test_layouts.py::test_label_that_is_no_class_is_named",),
    ),
    Mutant(
        "labels are numbers of the file's classes, not of the sorted ones",
        "src/data/sources/tiny_imagenet.py",
        "index[self.schema_names[code]]",
        "code",
        ("tests/test_sources.py::test_parquet_with_unsorted_class_label_is_renumbered",),
    ),
    Mutant(
        "own images for validation are trained on",
        "src/data/sources/images.py",
        'split = "valid" if top in VALID_FOLDERS else "train" if top == "train" else ""',
        'split = "train" if top in VALID_FOLDERS or top == "train" else ""',
        ("tests/test_sources.py::test_image_folder_uses_its_own_valid",),
    ),
    Mutant(
        "a class may be in train alone",
        "src/data/sources/images.py",
        '        if "valid" in used:\n',
        '        if "test" in used:\n',
        (f"{LAYOUTS}::test_contradictions_are_refused[class in train alone]",),
    ),
    # ------------------------------------------------------------------------------ who is trained on
    Mutant(
        "held-out images are trained on, too",
        "src/data/splits.py",
        "fit_N = train_N[~np.isin(train_N, holdout_N)]",
        "fit_N = train_N",
        ("tests/test_splits.py::test_holdout_is_exact_and_disjoint",),
    ),
    Mutant(
        "copies of an image are on both sides of the split",
        "src/data/splits.py",
        "yield list(copies)",
        "yield from ([row] for row in copies)",
        ("tests/test_splits.py::test_copies_stay_on_one_side",),
    ),
    Mutant(
        "choices are made on `valid`",
        "src/experiment.py",
        "batches(splits.holdout_N).at_size(size), cached)",
        "batches(splits.valid_N).at_size(size), cached)",
        ("tests/test_experiment.py::test_valid_is_scored_once_and_trained_on_never[holdout]",),
    ),
    Mutant(
        "`valid` is scored in another order than that of its labels",
        "src/experiment.py",
        "return data, batches(splits.valid_N).at_size(size), seconds",
        "return data, batches(np.sort(splits.valid_N)).at_size(size), seconds",
        ("tests/test_experiment.py::test_valid_is_scored_once_and_trained_on_never[holdout]",),
    ),
    Mutant(
        "a search chooses on `valid`",
        "src/search.py",
        'loss_and_accuracy(*saved_logits(setup, "holdout"))',
        'loss_and_accuracy(*saved_logits(setup, "valid"))',
        ("tests/test_search.py::test_holdout_alone_is_looked_at",),
    ),
    Mutant(
        "the temperature is fitted on `valid`",
        "src/experiment.py",
        'holdout = saved_logits(setup, "holdout")',
        'holdout = saved_logits(setup, "valid")',
        ("tests/test_experiment.py::test_the_temperature_is_holdout_s_where_valid_has_another",),
    ),
    Mutant(
        "the held-out score is that of the images that are trained on",
        "src/train.py",
        "batches = self.data.holdout\n        logits_NK",
        "batches = self.data.fit\n        logits_NK",
        ("tests/test_train.py::test_history_is_sums_over_rows",),
    ),
    # ------------------------------------------------------------------------------------ randomness
    Mutant(
        "every step is augmented alike",
        "src/data/batches.py",
        "derived_seed(seed, epoch, step)",
        "derived_seed(seed)",
        ("tests/test_batches.py::test_augmentation_differs_by_seed_epoch_and_step",),
    ),
    Mutant(
        "every epoch has the same order",
        "src/data/batches.py",
        "np.random.default_rng([seed, epoch])",
        "np.random.default_rng([seed])",
        ("tests/test_batches.py::test_orders_differ_by_seed_and_epoch",),
    ),
    Mutant(
        "images that are scored are augmented",
        "src/data/batches.py",
        "self._taken(some_of(parts)):\n            yield self._prepare(inputs), labels_B",
        "self._taken(some_of(parts)):\n            if not self.augmentation.is_identity:\n"
        "                generator = torch.Generator().manual_seed(0)\n"
        "                inputs = augment(inputs, self.augmentation, generator, self.preprocess.fill)\n"
        "            yield self._prepare(inputs), labels_B",
        ("tests/test_batches.py::test_in_order_is_never_augmented",),
    ),
    Mutant(
        "dropout draws from wherever the generator stands",
        "src/train.py",
        "        seed_dropout(derived_seed(*where))\n",
        "",
        ("tests/test_train.py::test_only_the_config_s_seed_matters",),
    ),
    Mutant(
        "dropout and mixup are the same in every step",
        "src/train.py",
        "where = (train.seed, progress.epoch, progress.step, DROPOUT_STREAM)",
        "where = (train.seed, DROPOUT_STREAM)",
        ("tests/test_train.py::test_every_step_is_mixed_by_its_own_draw",),
    ),
    # ---------------------------------------------------------------------------------- one step
    Mutant(
        "parts of a batch count alike, whatever their size",
        "src/train.py",
        "self.accelerator.backward(loss_sum / n_images)",
        "self.accelerator.backward(loss_sum / len(y) / n_parts)",
        ("tests/test_train.py::test_accumulated_gradients_are_the_full_batch_s[3]",),
    ),
    Mutant(
        "the history is a mean over batches instead of rows",
        "src/train.py",
        "return torch.cat([sums, norm.detach().double().view(1)])",
        "sums = sums / len(labels_B) * self.data.fit.n_examples / n_steps\n"
        "        return torch.cat([sums, norm.detach().double().view(1)])",
        ("tests/test_train.py::test_history_is_sums_over_rows",),
    ),
    Mutant(
        "where memory ran out, the rest of the batch is left out",
        "src/train.py",
        "(part.tensor_split(n_parts) for part in (inputs, labels_B))",
        "(part[:micro_batch].split(micro_batch) for part in (inputs, labels_B))",
        (f"{NUMBERS}::test_memory_that_runs_out_changes_no_gradient[3]",),
    ),
    Mutant(
        "gradients of an attempt that ran out of memory stay",
        "src/train.py",
        "self.optimizer.zero_grad(set_to_none=True)\n        seed_dropout",
        "seed_dropout",
        (f"{NUMBERS}::test_an_attempt_that_fails_half_way_leaves_no_gradient",),
    ),
    Mutant(
        "a gradient that is NaN changes the weights",
        "src/train.py",
        "found_inf = broken.float()",
        "found_inf = torch.zeros_like(broken.float())",
        (f"{NUMBERS}::test_not_finite_changes_nothing[clipped]",),
    ),
    Mutant(
        "a loss or gradient that is not finite is let pass",
        "src/train.py",
        "if not math.isfinite(value):",
        "if False:",
        ("tests/test_train.py::test_loss_that_is_not_finite_stops_the_run",),
    ),
    Mutant(
        "label smoothing is dropped",
        "src/train.py",
        "label_smoothing=smoothing",
        "label_smoothing=0.0",
        ("tests/test_train.py::test_accumulated_gradients_are_the_full_batch_s[64]",),
    ),
    Mutant(
        "mixed images keep the first image's label",
        "src/train.py",
        "inputs, labels_B = self.mix(inputs, labels_B)",
        "inputs, _ = self.mix(inputs, labels_B)",
        (f"{MIXED}[8-mixup]",),
    ),
    Mutant(
        "gradients are not clipped",
        "src/train.py",
        "optim.clip_norm or math.inf",
        "math.inf",
        ("tests/test_ingredients.py::test_an_ingredient_changes_what_is_learned[optim.clip_norm]",),
    ),
    Mutant(
        "the schedule begins anew with every epoch",
        "src/train.py",
        "step = progress.epoch * n_steps + progress.step",
        "step = progress.step",
        ("tests/test_train.py::test_every_step_has_the_rate_of_its_place_in_all_of_the_training",),
    ),
    Mutant(
        "norms and biases decay",
        "src/optim.py",
        "decayed = parameter.ndim > 1 and name not in undecayed",
        "decayed = name not in undecayed",
        ("tests/test_optim.py::test_decay_of_one_leaves_four_groups",),
    ),
    Mutant(
        "layer decay is upside down: the stem learns fastest",
        "src/optim.py",
        "config.layer_decay ** (n_groups - 1 - depth)",
        "config.layer_decay**depth",
        (
            "tests/test_optim.py::"
            "test_rates_fall_from_the_top_of_the_backbone_to_its_stem[convnext_tiny-12-20]",
        ),
    ),
    Mutant(
        "frequent classes weigh more, rare ones less",
        "src/optim.py",
        "np.divide(len(labels_M), n_classes * counts_K, where",
        "np.divide(n_classes * counts_K, len(labels_M), where",
        ("tests/test_optim.py::test_class_weights_are_scikit_learn_s",),
    ),
    Mutant(
        "L2-SP pulls to zero instead of to the pretrained weights",
        "src/optim.py",
        "p.detach().clone() for p in self.parameters",
        "torch.zeros_like(p) for p in self.parameters",
        ("tests/test_optim.py::test_l2_sp_is_zero_where_it_starts",),
    ),
    # ------------------------------------------------------------------- the best epoch, and going on
    Mutant(
        "the best weights go on learning after their epoch",
        "src/train.py",
        "self.best_state = copied(self.model.learned_state())",
        "self.best_state = self.model.learned_state()",
        ("tests/test_train.py::test_early_stopping[loss-scores0-2-4]",),
    ),
    Mutant(
        "of the weights' average nothing is scored",
        "src/train.py",
        'with self.averages["ema"].in_place() if "ema" in self.averages else nullcontext():',
        "with nullcontext():",
        ("tests/test_train.py::test_the_gate_in_the_history_is_the_average_s",),
    ),
    Mutant(
        "a resumed run has forgotten the optimizer's moments",
        "src/train.py",
        'self.optimizer.load_state_dict(payload["optimizer"])\n',
        "pass\n",
        (f"{CUT_OFF}[end_epoch-1-test_convnext.r160_in1k]",),
    ),
    Mutant(
        "a resumed run has forgotten its best weights",
        "src/train.py",
        'self.best_state = payload["best"]',
        'self.best_state = payload["model"]',
        (
            f"{CUT_OFF}[end_epoch-3-test_convnext.r160_in1k]",
            f"{CUT_OFF}[end_epoch-3-test_efficientnet.r160_in1k]",
        ),
    ),
    Mutant(
        "a resumed run has forgotten the weights' averages",
        "src/train.py",
        'average.restore(payload["averages"][name])',
        "average.n_updates = average.n_updates",
        (f"{EVERYTHING}[train_step-5-test_convnext.r160_in1k]",),
    ),
    Mutant(
        "a resumed epoch has forgotten the losses of its first half",
        "src/train.py",
        'Progress(**payload["progress"])',
        'Progress(**payload["progress"] | {"loss_sum": 0.0})',
        ("tests/torture/test_torture_kill.py::test_killed_until_done[baseline in images]",),
    ),
    Mutant(
        "a resumed epoch begins with its first step again",
        "src/train.py",
        "batches.epoch(train.seed, progress.epoch, progress.step)",
        "batches.epoch(train.seed, progress.epoch)",
        (f"{CUT_OFF}[save-1-test_convnext.r160_in1k]",),
    ),
    Mutant(
        "weights that nobody trained keep others' batch statistics",
        "src/after.py",
        "            measure_statistics(model, data)\n",
        "",
        ("tests/test_after.py::test_weights_between_are_scored_with_statistics_of_their_own",),
    ),
    # ------------------------------------------------------------------------------------- the model
    Mutant(
        "a frozen backbone's batch norms learn statistics",
        "src/model/build.py",
        "                module.eval()\n",
        "                module.train(mode)\n",
        ("tests/test_model.py::test_frozen_backbone_stays_in_eval_mode_and_out_of_the_learned_state",),
    ),
    Mutant(
        "attention's gate does not start at zero",
        "src/model/attention.py",
        "self.gate = nn.Parameter(torch.full((1,), gate))\n        self.position_bias",
        "self.gate = nn.Parameter(torch.full((1,), gate + 0.1))\n        self.position_bias",
        ("tests/test_model.py::test_attention_starts_as_the_plain_head",),
    ),
    Mutant(
        "the classifier starts from other classes' rows",
        "src/model/build.py",
        "rows = torch.tensor([row_of[wnid] for wnid in wnids])",
        "rows = torch.arange(len(wnids))",
        ("tests/test_model.py::test_pretrained_rows_are_the_classes_own",),
    ),
    Mutant(
        "pretrained weights of another hash are taken",
        "src/model/build.py",
        "if expected_sha256 and found_sha256 != expected_sha256:",
        "if not found_sha256:",
        ("tests/test_model.py::test_pinned_hash_is_checked",),
    ),
    Mutant(
        "a file of weights may run code",
        "src/model/build.py",
        "weights_only=True",
        "weights_only=False",
        (f"{ARCHIVES}::test_pickles_run_no_code_wherever_files_are_read[weights .pth]",),
    ),
    Mutant(
        "images are resized without antialiasing for the model",
        "src/data/batches.py",
        "interpolation=mode, antialias=True",
        "interpolation=mode, antialias=False",
        ("tests/test_batches.py::test_resize_is_pillow_s",),
    ),
    Mutant(
        "images are normalised in another range",
        "src/data/batches.py",
        "(255 * torch.tensor([mean, std]))",
        "torch.tensor([mean, std])",
        ("tests/test_batches.py::test_normalisation_is_torchvision_s",),
    ),
    Mutant(
        "labels are those of the row before",
        "src/data/batches.py",
        "labels_N.index_select(0, index_B),",
        "labels_N.roll(1).index_select(0, index_B),",
        ("tests/test_batches.py::test_an_epoch_covers_each_example_once_in_even_steps",),
    ),
    Mutant(
        "cached features of other weights are taken",
        "src/experiment.py",
        '        "weights": built.weights_sha256,\n',
        "",
        ("tests/test_experiment.py::test_features_are_computed_once_and_anew_for_other_weights",),
    ),
    # ------------------------------------------------------------------------------------- numbers
    Mutant(
        "the interval is the normal one",
        "src/evaluate.py",
        'alpha=0.05, method="wilson"',
        'alpha=0.05, method="normal"',
        ("tests/test_evaluate.py::test_wilson_against_scipy",),
    ),
    Mutant(
        "McNemar's test counts the pairs that agree",
        "src/evaluate.py",
        "mcnemar([[both, only_a], [only_b, neither]]",
        "mcnemar([[only_a, both], [neither, only_b]]",
        ("tests/test_evaluate.py::test_the_studys_numbers",),
    ),
    Mutant(
        "images are paired by row, whatever their ids",
        "src/evaluate.py",
        '        b = b.set_index("Image_Id").loc[a["Image_Id"]].reset_index()\n',
        "",
        ("tests/test_evaluate.py::test_rows_are_paired_by_image_id",),
    ),
    Mutant(
        "top-5 is of the first five classes, not of the likeliest",
        "src/evaluate.py",
        "((logits_NK > true_N1) | ((logits_NK == true_N1) & earlier_NK)).sum(axis=1)",
        "earlier_NK.sum(axis=1)",
        ("tests/test_evaluate.py::test_frame_against_torch",),
    ),
    Mutant(
        "top-5 is top-6",
        "src/evaluate.py",
        'float((frame["True_Rank"] < 5).mean())',
        'float((frame["True_Rank"] <= 5).mean())',
        ("tests/test_evaluate.py::test_frame_against_torch",),
    ),
    Mutant(
        "a calibration bin has its lower bound instead of its upper",
        "src/evaluate.py",
        "np.ceil(confidence_N * N_BINS).astype(int) - 1",
        "np.floor(confidence_N * N_BINS).astype(int)",
        (
            "tests/test_evaluate.py::"
            "test_reliability_leaves_empty_bins_out_and_bounds_belong_to_the_bin_below",
        ),
    ),
    Mutant(
        "over- and underconfidence of different bins cancel",
        "src/evaluate.py",
        "float(np.abs(gaps).sum() / len(confidence_N))",
        "float(np.abs(gaps.sum()) / len(confidence_N))",
        ("tests/test_evaluate.py::test_calibration_error_against_a_plain_loop",),
    ),
    Mutant(
        "rows of the confusion matrix are predictions",
        "src/evaluate.py",
        'frame["Ground_Truth"].to_numpy() * n_classes + frame["Prediction"].to_numpy()',
        'frame["Prediction"].to_numpy() * n_classes + frame["Ground_Truth"].to_numpy()',
        ("tests/test_evaluate.py::test_per_class_and_confusion_agree",),
    ),
    Mutant(
        "an ensemble averages logarithms instead of probabilities",
        "src/ensemble.py",
        "logsumexp(log_probabilities_MNK, axis=0) - np.log(len(logits_MNK))",
        "log_probabilities_MNK.mean(axis=0)",
        ("tests/test_ensemble.py::test_the_mean_is_of_probabilities_and_is_never_infinite",),
    ),
    # ------------------------------------------------------------------- a run's folder, and processes
    Mutant(
        "the lock of a run's folder is not taken",
        "src/folders.py",
        "        lock.acquire()\n",
        "        lock.lock_file\n",
        ("tests/test_experiment.py::test_two_processes_do_not_work_on_one_run",),
    ),
    Mutant(
        "a run of another configuration is gone on with",
        "src/experiment.py",
        "if changed := configs.differences(identity, before):",
        "if changed := configs.differences(identity, identity):",
        ("tests/test_experiment.py::test_where_the_data_lay_is_no_part_of_a_run",),
    ),
    Mutant(
        "a run of a configuration that differs in one field is gone on with",
        "src/experiment.py",
        "if changed := configs.differences(identity, before):",
        "if changed := configs.differences(identity, before)[1:]:",
        ("tests/torture/test_torture_weights.py::test_other_weights_are_refused",),
    ),
    Mutant(
        "whether a folder can be written to is found out after training",
        "src/folders.py",
        '            probe.write_bytes(b"x")\n'
        "        finally:  # a full disk has room for its name\n"
        "            probe.unlink(missing_ok=True)\n",
        "            pass\n        finally:\n            pass\n",
        ("tests/torture/test_torture_disk.py::test_a_read_only_folder_is_refused_before_training[results]",),
    ),
    Mutant(
        "gradients of several processes are averaged, not added",
        "src/train.py",
        "        processes.sum_in_place([*gradients, *statistics])",
        "        for gradient in gradients:\n"
        "            gradient.div_(n)\n"
        "        processes.sum_in_place([*gradients, *statistics])",
        (AGREE,),
    ),
    Mutant(
        "every process writes",
        "src/processes.py",
        "return state().is_main_process",
        "return state().is_main_process or state().num_processes > 1",
        (AGREE,),
    ),
    Mutant(
        "a snapshot is not read back",
        "src/backup.py",
        "if sha256(path) != digest:",
        "if not digest:",
        (f"{DRIVE}::test_a_copy_that_reads_otherwise_removes_nothing",),
    ),
    Mutant(
        "a damaged snapshot is unpacked",
        "src/backup.py",
        "if sha256(local) != digest:",
        "if not digest:",
        (f"{DRIVE}::test_a_copy_that_reads_otherwise_removes_nothing",),
    ),
    Mutant(
        "a snapshot may unpack to any place",
        "src/backup.py",
        'filter="data"',
        'filter="fully_trusted"',
        (f"{DRIVE}::test_a_foreign_archive_lands_nowhere_else",),
    ),
)


@dataclass(frozen=True)
class Ended:
    """How pytest ended: its status (None: it was stopped), the tests that failed, what it said."""

    status: int | None
    failed: tuple[str, ...]
    said: str


def verdict(ended: Ended) -> str:
    """`killed` where a test failed, and nothing else happened; else `survived`, and why."""
    if ended.status == 1 and ended.failed:
        return "killed"
    reasons = {0: "", 1: " (a fixture failed, no test)", None: " (pytest did not end by itself)"}
    return "survived" + reasons.get(ended.status, f" (no test ran: pytest's status is {ended.status})")


class Server:
    """A process in a copy of the repository, for as long as the `with` block lasts; see `serve`."""

    def __init__(self, copy: Path) -> None:
        self.copy = copy
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORTURE": ""}
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from tools.mutants import serve; serve()"],
            cwd=copy,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()

    def run(self, tests: Sequence[str], seconds: int = SECONDS) -> Ended:
        """The tests in the copy, one process and one core."""
        log, folder = self.copy.with_suffix(".log"), self.copy.with_suffix(".tmp")
        order = {"arguments": [*PYTEST, f"--basetemp={folder}", *tests], "log": str(log), "seconds": seconds}
        print(json.dumps(order), file=self.process.stdin, flush=True)
        status, failed = json.loads(self.process.stdout.readline())
        return Ended(status, tuple(failed), log.read_text(encoding="utf-8", errors="replace"))

    def run_mutant(self, mutant: Mutant) -> Ended:
        """Its tests with the mutant in the copy, which is whole again afterwards."""
        whole = (self.copy / mutant.file).read_text(encoding="utf-8")
        self.write(mutant.file, mutant.applied_to(whole))
        try:
            return self.run(mutant.tests)
        finally:
            self.write(mutant.file, whole)

    def write(self, name: str, text: str) -> None:
        """A file, and no compiled one of the text before: Python tells them apart by whole seconds."""
        path = self.copy / name
        path.write_text(text, encoding="utf-8")
        Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)


class Failures:
    """pytest's plugin: the tests that failed. `torture.attempts` tells its failures at teardown."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and report.when != "setup":
            self.found.append(report.nodeid)


def serve() -> None:
    """Obey orders from standard input, a line each: pytest, in a fork of this process.

    So that what is `SLOW_TO_IMPORT` is imported once; nothing of the repository is but in a fork.
    """
    for name in SLOW_TO_IMPORT:
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        order = json.loads(line)
        if not (pid := os.fork()):
            run_tests(order, answers)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            print(json.dumps([None, []]), file=answers, flush=True)


def run_tests(order: dict, answers: TextIO) -> None:
    """Run pytest, answer with its status and the tests that failed, and end the process."""
    import pytest

    signal.alarm(order["seconds"])
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    failures, status = Failures(), 1
    try:
        ended = pytest.main(order["arguments"], plugins=[failures])
        print(json.dumps([int(ended), failures.found]), file=answers, flush=True)
        status = 0
    finally:
        os._exit(status)


def copied(root: Path, target: Path) -> Path:
    """The files that git holds or would add, at `target`."""
    from tools.check import tracked  # whose imports take seconds

    for name in tracked(root):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, target / name)
    return target


def judge(mutants: Sequence[Mutant], servers: Sequence[Server]) -> int:
    """Run every mutant on one of the servers, print a line each; how many survived."""
    free: SimpleQueue[Server] = SimpleQueue()
    for server in servers:
        free.put(server)

    def judged(mutant: Mutant) -> Ended:
        server = free.get()
        try:
            return server.run_mutant(mutant)
        finally:
            free.put(server)

    width, n_survived = max(len(mutant.name) for mutant in mutants), 0
    with ThreadPoolExecutor(len(servers)) as pool:
        for mutant, ended in zip(mutants, pool.map(judged, mutants), strict=True):
            n_survived += verdict(ended) != "killed"
            tests = ", ".join(dict.fromkeys(ended.failed or mutant.tests))
            print(f"{mutant.name:<{width}} | {tests} | {verdict(ended)}", flush=True)
    return n_survived


def main(arguments: list[str]) -> int:
    """The command line; 1 where a mutant survived, or the tests fail on the unbroken code."""
    parser = argparse.ArgumentParser(prog="python -m tools.mutants", description=__doc__.split("\n")[0])
    parser.add_argument("-k", metavar="TEXT", default="", help="only mutants whose name has TEXT")
    parser.add_argument("-j", type=int, choices=(1, 2), default=1, help="mutants at a time")
    options = parser.parse_args(arguments)
    mutants = [mutant for mutant in MUTANTS if options.k in mutant.name]
    if not mutants:
        parser.error(f"no mutant's name has {options.k!r}")
    tests = list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        copies = [copied(ROOT, Path(folder) / f"copy{number}") for number in range(options.j)]
        servers = [stack.enter_context(Server(copy)) for copy in copies]
        print(f"{len(tests)} tests on the unbroken code ...", flush=True)
        ended = servers[0].run(tests, SECONDS * len(tests))
        if ended.status != 0:
            print(ended.said[-5000:], "The tests do not pass on the unbroken code.", sep="\n")
            return 1
        n_survived = judge(mutants, servers)
    print(f"{len(mutants) - n_survived} of {len(mutants)} killed")
    return int(n_survived > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
