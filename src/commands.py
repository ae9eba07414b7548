"""The command line, `python -m src.experiment COMMAND`: a preset to run, or what is made of runs.

baseline, improvement, best, ...   run a preset: train, score `valid` once, write its results
ablation                           what each ingredient is worth, row by row
transfer40                         frozen against fine-tuned on classes that the weights have not met
find_lr                            the learning rates at which the loss falls most steeply
search                             better rates, dropout and weight decay, by trial
soup                               average the finished runs of several seeds
ensemble                           average what the finished runs of several seeds, or presets, answered
export                             a finished run's weights, with their card, into weights/
cross_validate                     every train image answered once, by a run that has not seen it
predict                            a finished run's answers for a folder of images, as CSV
strangers                          what test images of unknown classes cost, and what refusing wins back
zero_shot                          the same of CLIP, which has not trained on them, and of both together
audit                              copies among the images; what the pretrained weights know of them
analysis                           what baseline and improvement get wrong
explain                            where their models look, or that of another preset
attributions                       which parts of an image a run's answers rest on, by LIME and SHAP
report                             results/report.html, a page of all results
summary                            a line an arm
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from src import SetupError, processes
from src import config as configs
from src.config import Config
from src.data.splits import make_splits
from src.experiment import DATA_VARIABLE, Result, configure, finished_run, open_data, run
from src.files import read_json
from src.folders import Paths, shown


def obey(args: argparse.Namespace) -> str:
    """Do what the command line asks for; what it says at the end."""
    if args.command in COMMANDS:
        require_one_process(args.command)
        if args.backup and args.command != "cross_validate":
            raise SetupError(
                f"{args.command} makes no snapshots: leave --backup out. It keeps runs of presets and folds; "
                "of a study, --results holds what goes on."
            )
        return COMMANDS[args.command](args)
    config, paths = config_of(args, args.command), paths_of(args)
    if args.images:
        return run_and_answer(config, paths, args)
    if args.out:
        raise SetupError(
            f"--out {args.out} is for the answers about --images FOLDER, which is not given. (`predict` "
            "answers the data's own test images.)"
        )
    run(config, paths)
    return summary(paths.results)


def require_one_process(what: str) -> None:
    if processes.n_processes() > 1:
        raise SetupError(f"{what} works in one process: start it without `accelerate launch`.")


def run_and_answer(config: Config, paths: Paths, args: argparse.Namespace) -> str:
    """Run the preset, then answer the images of --images; what is wrong with those is said first."""
    from src.answers import answer, require_answerable

    out = Path(args.out or ANSWERS)
    require_one_process("--images")
    require_answerable(args.images, out)
    said = answer(run(config, paths).setup, args.images, out, config.data.skip_bad)
    return "\n".join([summary(paths.results), *said])


ANSWERS = "answers.csv"
OPTIONS: dict[str, dict] = {
    "--profile": {"default": "full", "help": f"one of: {', '.join(configs.PROFILES)} (default: full)"},
    "--data": {"default": "", "help": f"local data instead of the profile's source (or {DATA_VARIABLE})"},
    "--protocol": {"default": "holdout", "help": "holdout (default) or published"},
    "--seed": {"type": int, "default": 0},
    "--results": {"default": "", "help": "folder for what people read"},
    "--runs": {"default": "", "help": "folder for checkpoints and logits"},
    "--cache": {"default": "", "help": "folder for the decoded images and features"},
    "--backup": {"default": "", "help": "a drive that gets snapshots of --runs, and gives them back"},
    "--skip-bad": {"action": "store_true", "help": "leave unreadable images out, and count them"},
    "--set": {"action": "append", "default": [], "metavar": "KEY=VALUE", "help": "any config field"},
    "--preset": {
        "default": "improvement",
        "help": "for other commands (default: improvement); ensemble takes several with commas",
    },
    "--images": {
        "default": "",
        "metavar": "FOLDER",
        "help": "images to answer, for a preset and for predict (predict without it: the data's test images)",
    },
    "--out": {"default": "", "metavar": "CSV", "help": f"the answers' file (default: {ANSWERS})"},
    "--rows": {"nargs": "+", "default": [], "metavar": "NAME", "help": "for studies (default: all)"},
    "--seeds": {"default": "0,1,2", "help": "for studies, soup and ensemble (default: 0,1,2)"},
    "--trials": {"type": int, "default": 20, "help": "for search (default: 20)"},
    "--folds": {"type": int, "default": 5, "help": "for cross_validate (default: 5)"},
}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m src.experiment",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "command",
        choices=[*configs.PRESETS, *COMMANDS],
        help="a preset to run, or a command",
        metavar="COMMAND",
    )
    for name, options in OPTIONS.items():
        parser.add_argument(name, **options)
    return parser.parse_args(arguments)


def paths_of(args: argparse.Namespace) -> Paths:
    return Paths.of(args.profile, args.results, args.runs, args.cache, args.backup)


def overrides_of(args: argparse.Namespace) -> dict[str, object]:
    pairs = [item.partition("=") for item in args.set]
    skip = {"data.skip_bad": True} if args.skip_bad else {}
    return {"data.protocol": args.protocol, **skip, **{key: value for key, _, value in pairs}}


def config_of(args: argparse.Namespace, arm: str) -> Config:
    return configure(arm, args.profile, args.data, {"train.seed": args.seed, **overrides_of(args)})


def read_seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise SetupError(
            f"--seeds {text!r} cannot be read; write numbers with commas, such as 0,1,2."
        ) from None


# A function a command; each imports what it needs, so that none waits for the others' libraries. -------


def ablation(args: argparse.Namespace) -> str:
    from src.studies import STUDIES, TRANSFER
    from src.studies.reported import write_beside_reported
    from src.studies.run import Plan, run_study

    if args.preset == TRANSFER.name:  # its rows need weights that it trains first
        return transfer40(args)
    study = STUDIES.get("ablation" if args.preset == "improvement" else args.preset)
    if study is None:
        known = ", ".join(name for name in STUDIES if name != "ablation")
        raise SetupError(f"--preset {args.preset}: there are rows of {known}, and without it the ablation's.")
    plan = Plan(study, args.profile, args.data, overrides_of(args))
    paths = paths_of(args)
    folder = run_study(plan, paths, args.rows, read_seeds(args.seeds))
    if study.name in configs.STUDY_ARMS:
        write_beside_reported(study, paths.results)
    return summary_of(folder)


def transfer40(args: argparse.Namespace) -> str:
    from src.studies.run import Plan
    from src.studies.transfer import TRANSFER, run_transfer

    plan = Plan(TRANSFER, args.profile, args.data, overrides_of(args))
    return summary_of(run_transfer(plan, paths_of(args), args.rows, read_seeds(args.seeds)))


def summary_of(folder: Path) -> str:
    """A study in words."""
    return (folder / "summary.md").read_text(encoding="utf-8")


def find_lr(args: argparse.Namespace) -> str:
    from src.lr_finder import find_lr

    config = config_of(args, args.preset)
    folder, factor = find_lr(config, paths_of(args))
    lr, head_lr = factor * config.optim.lr, factor * config.optim.head_lr
    return f"steepest fall at optim.lr = {lr:.2g}, optim.head_lr = {head_lr:.2g}; see {shown(folder)}"


def soup(args: argparse.Namespace) -> str:
    from src.soup import soup_of_seeds

    _, scores = soup_of_seeds(config_of(args, args.preset), read_seeds(args.seeds), paths_of(args))
    lines = [
        f"{name:<8} holdout {s['holdout']['accuracy']:.2%}  valid {s['valid']['accuracy']:.2%}"
        for name, s in scores.items()
        if name != "chosen"
    ]
    return "\n".join([*lines, f"chosen on holdout: {scores['chosen']}"])


def search(args: argparse.Namespace) -> str:
    from src.search import in_words, search

    folder, found = search(config_of(args, args.preset), paths_of(args), args.trials)
    return f"{in_words(found)}; see {shown(folder)}\n{found['command']}"


def ensemble(args: argparse.Namespace) -> str:
    from src.ensemble import ensemble_of, in_words

    members = [config_of(args, arm) for arm in args.preset.split(",")]
    folder, numbers = ensemble_of(members, read_seeds(args.seeds), paths_of(args))
    scores = numbers["scores"]
    width = max(len(name) for name in scores)
    lines = [
        f"{name:<{width}} holdout {s['holdout']['accuracy']:.2%}  valid {s['valid']['accuracy']:.2%}"
        for name, s in scores.items()
    ]
    return "\n".join([*lines, in_words(numbers), f"see {shown(folder)}"])


def export(args: argparse.Namespace) -> str:
    from src.embedded import export

    path, digest = export(finished_result(args))
    return f"{shown(path)}: SHA-256 {digest}"


def cross_validate(args: argparse.Namespace) -> str:
    from src.folds import cross_validate, in_words

    folder, found = cross_validate(config_of(args, args.preset), paths_of(args), args.folds)
    return f"{in_words(found)}; see {shown(folder)}"


def predict(args: argparse.Namespace) -> str:
    from src.answers import write_answers

    config = config_of(args, args.preset)
    return "\n".join(write_answers(config, paths_of(args), args.images, Path(args.out or ANSWERS)))


def strangers(args: argparse.Namespace) -> str:
    from src.strangers import write_strangers

    return f"see {shown(write_strangers(finished_result(args)))}"


def zero_shot(args: argparse.Namespace) -> str:
    from src.strangers import write_zero_shot

    return f"see {shown(write_zero_shot(finished_result(args)))}"


def finished_result(args: argparse.Namespace) -> Result:
    """The finished run of --preset, its results written anew."""
    config, paths = config_of(args, args.preset), paths_of(args)
    finished_run(config, paths)
    return run(config, paths)


def audit(args: argparse.Namespace) -> str:
    from src.audit import audit_data

    return f"see {shown(audit_data(config_of(args, args.preset), paths_of(args)))}"


def analysis(args: argparse.Namespace) -> str:
    from src.analysis import read_arms, read_superclasses, write_analysis

    paths, config = paths_of(args), config_of(args, "improvement")
    predicted, _, _ = read_arms(paths.results)
    store = open_data(config, paths)
    valid_N = make_splits(store, config.data).valid_N
    if predicted["Image_Id"].tolist() != store.image_ids_N[valid_N].tolist():
        raise SetupError(
            f"the predictions under {paths.results} are not of the images of {store.manifest['source']}. "
            "Name their data with --data, --profile and --protocol."
        )
    write_analysis(paths.results, lambda rows: store.pictures(valid_N[rows]), read_superclasses())
    return f"see {shown(paths.results / 'analysis')}"


def explain(args: argparse.Namespace) -> str:
    from src.explain import shown_together, write_explanations

    paths, configs_of_arms = paths_of(args), [config_of(args, arm) for arm in shown_together(args.preset)]
    for config in configs_of_arms:
        finished_run(config, paths)
    return f"see {shown(write_explanations([run(config, paths) for config in configs_of_arms]))}"


def attributions(args: argparse.Namespace) -> str:
    from src.attributions import write_attributions

    result = finished_result(args)
    folder = result.setup.paths.results_around(result.setup.config) / "explain"
    write_attributions(result, folder)
    return f"see {shown(folder)}"


def report(args: argparse.Namespace) -> str:
    from src.page import write_page

    return f"see {shown(write_page(paths_of(args).results))}"


def summary(results: Path) -> str:
    """A line an arm: accuracy with its interval, seconds, folder."""
    files = [*sorted(results.glob("*/metrics.json")), *sorted(results.glob("studies/**/metrics.json"))]
    found = [(path.parent, read_json(path)) for path in files]
    if not found:
        raise SetupError(f"no metrics.json in the folders of {results}: run an arm first.")
    width = max(12, *(len(m["arm"]) for _, m in found))
    lines = [f"{'arm':<{width}} {'accuracy':>8}  {'95 % interval':<18} {'seconds':>7}  folder"]
    for folder, m in found:
        interval = f"[{m['wilson_low']:.2%}, {m['wilson_high']:.2%}]"
        seconds = m["seconds"]["total"]
        lines.append(
            f"{m['arm']:<{width}} {m['accuracy']:>8.2%}  {interval:<18} {seconds:>7.0f}  {shown(folder)}"
        )
    return "\n".join(lines)


COMMANDS: dict[str, Callable[[argparse.Namespace], str]] = {
    "ablation": ablation,
    "transfer40": transfer40,
    "find_lr": find_lr,
    "search": search,
    "soup": soup,
    "ensemble": ensemble,
    "export": export,
    "cross_validate": cross_validate,
    "predict": predict,
    "strangers": strangers,
    "zero_shot": zero_shot,
    "audit": audit,
    "analysis": analysis,
    "explain": explain,
    "attributions": attributions,
    "report": report,
    "summary": lambda args: summary(paths_of(args).results),
}


def main(arguments: list[str] | None = None) -> int:
    """The command line; a `SetupError` is one message and exit status 2."""
    try:
        said = obey(parse_arguments(arguments))
        processes.end()
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if processes.is_main():
        print(said)
    return 0
