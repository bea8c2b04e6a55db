"""`knorm ppl ENGINE:MODEL ...`: what the caches of an engine cost in quality, and for what memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from knorm.cli.numbers import Above
from knorm.cli.options import ModelOptions, bundled, make_console, progress_bar, waiting
from knorm.cli.setting import TextOptions

if TYPE_CHECKING:
    from rich.console import Console

    from knorm.engines.conditions import EngineTarget
    from knorm.engines.ways import EngineWays
    from knorm.evaluation.ways import Evaluation

ALLOWED = frozenset(
    {
        *("targets", "text", "column", "window", "windows", "prompt_length", "how", "plot", "json", "quiet"),
        *("engine_python", "engine_limit"),
    }
)  # of the parameters of knorm ppl
ENDPOINT_ALLOWED = (ALLOWED | {"model", "dtype", "device", "reference"}) - {"engine_python"}


@dataclass(frozen=True)
class EngineOptions:
    """Say where an engine runs, how long it may take for an answer, and which server has the full cache."""

    engine_python: str | None
    engine_limit: float
    reference: str | None


engine_options = bundled(
    EngineOptions,
    "engine_options",
    click.option(
        "--engine-python", metavar="PYTHON", show_default="this one", help="The interpreter that has a TARGET's engine."
    ),
    click.option(
        "--engine-limit",
        type=Above("seconds"),
        default=300.0,
        show_default=True,
        help="Seconds that an engine may take for an answer.",
    ),
    click.option(
        "--reference",
        metavar="URL",
        help="Beside a server's endpoint: that of one with the full cache, as http://127.0.0.1:8001/v1#MODEL.",
    ),
)


def engines_among(targets: Sequence[str], given: frozenset[str]) -> bool:
    """Tell whether targets are engines; refuse what has no meaning for them.

    Args:
        targets: as on the command line.
        given: the parameters that the command line gives.

    Returns:
        True where all are, False where none is.

    Raises:
        ValueError: some are and some are not, or an option is not for engines.
    """
    from knorm.methods.targets import is_endpoint, is_engine

    engines = [target for target in targets if is_engine(target)]
    own = sorted({"engine_python", "engine_limit", "reference"} & given)
    if not engines:
        if own:
            raise ValueError(f"--{own[0].replace('_', '-')} is about an engine, as llama.cpp:smollm2: give one")
        return False
    if len(engines) < len(targets):
        other = next(target for target in targets if target not in engines)
        raise ValueError(
            f"{engines[0]} is an engine, whose full cache is its own, and {other} is none: give them one command each, "
            "and both results of --json to knorm page"
        )
    endpoints = [target for target in targets if is_endpoint(target)]
    if endpoints and len(endpoints) < len(targets):
        other = next(target for target in targets if target not in endpoints)
        raise ValueError(f"{endpoints[0]} is a server's endpoint, and {other} is none: give them one command each")
    if refused := sorted(given - (ENDPOINT_ALLOWED if endpoints else ALLOWED)):
        why = "its settings are the server's own" if endpoints else "its settings stand in the target"
        why = {"model": "it brings its own model", "reference": "its full cache is its own"}.get(refused[0], why)
        raise ValueError(f"--{refused[0].replace('_', '-')} is not for an engine such as {engines[0]}: {why}")
    return True


def compare_engines(
    targets: Sequence[str],
    how: str,
    prompt_length: int | None,
    text_options: TextOptions,
    model_options: ModelOptions,
    engine_options: EngineOptions,
    *,
    plot: Path | None,
    quiet: bool,
    verbose: bool,
) -> tuple[bool, dict[str, Any]]:
    """Measure, show and draw; True where every condition ran, and the results as JSON has them."""
    from knorm.engines.boxed import model_file
    from knorm.engines.conditions import Place

    if how == "schedule":
        raise ValueError("an engine has no schedule: give --how loop, 'two calls' or auto, which is the loop")
    wanted = _wanted(targets)
    prompt = text_options.window // 2 if prompt_length is None else prompt_length
    model_options = replace(model_options, model=wanted[0].model)
    console = make_console(quiet)
    with waiting():
        from knorm.engines.ways import EngineWays
        from knorm.evaluation.windows import cut_windows
        from knorm.models import load_text

        model, tokenizer = model_options.load()
        text = load_text(text_options.text, text_options.column)
    windows = cut_windows(tokenizer, text, text_options.window, text_options.windows)
    place = Place(engine_options.engine_python, engine_options.engine_limit)
    with model_file(wanted[0].model, model, wanted[0].settings.form) as file:
        way: Any = "loop" if how == "auto" else how
        ways = EngineWays(model, windows, prompt, file=file, place=place, how=way)
        rows, beside, failed = _measured(ways, wanted, quiet)
    first, said = wanted[0], ways.said
    count, length = windows.input_ids.shape
    many = "1 window" if count == 1 else f"{count} windows"
    title = f"{first.model} in {first.engine} ({first.settings.package} {said['version']}) on {text_options.text}: "
    title += f"{many} of {length} tokens, prompt {prompt}"
    whole = f"{title}\nThe full cache has {first.settings.full_is}"
    _show(console, rows, beside, failed, whole, prompt, verbose=verbose)
    if plot:
        from knorm.cli.figures import plot_frontier

        plot_frontier(rows, title, plot)
    from knorm.cli.compared import row_fields

    fields = {
        **asdict(model_options), **asdict(text_options), "batch": 1, "prompt_length": prompt,
        "rows": [row_fields(row) for row in rows], "failed": failed, "facts": {},
        "engine": {**_engine_fields(first, said, engine_options), "beside": [row_fields(row) for row in beside]},
    }  # fmt: skip
    return not failed, fields


def _wanted(targets: Sequence[str]) -> list[EngineTarget]:
    from knorm.engines.conditions import engine_target

    wanted = [engine_target(spec) for spec in targets]
    if others := {target.host for target in wanted[1:]} - {wanted[0].host}:
        raise ValueError(f"{wanted[0].host} and {min(others)} are two models: give them one command each")
    return wanted


def _engine_fields(target: EngineTarget, said: dict[str, Any], options: EngineOptions) -> dict[str, Any]:
    return {
        "name": target.engine, "package": target.settings.package, "version": said["version"],
        "system": said["system"].strip(), "full": target.settings.full_is, "python": options.engine_python,
    }  # fmt: skip


def _measured(
    ways: EngineWays, targets: Sequence[EngineTarget], quiet: bool
) -> tuple[list[Evaluation], list[Evaluation], dict[str, str]]:
    """Measure the control, each target with its own, and the engine beside transformers."""
    from knorm.engines.process import EngineError

    failed: dict[str, str] = {}
    with progress_bar(quiet) as progress:
        task = progress.add_task("engine", total=len(targets) + 2)
        rows, beside = [ways.control(targets[0])], []
        for target in targets:
            progress.update(task, advance=1, description=target.spec)
            try:
                pair = ways.evaluate(target)
            except EngineError as error:
                if len(targets) == 1:
                    raise
                failed[target.spec] = f"{target.spec}: {error}"
                continue
            rows.append(pair.row)
            beside.append(pair.again)
        progress.update(task, advance=1, description="transformers")
        beside.append(ways.beside(targets[0]))
    return rows, beside, failed


def _show(
    console: Console,
    rows: Sequence[Evaluation],
    beside: Sequence[Evaluation],
    failed: dict[str, str],
    title: str,
    prompt: int,
    *,
    verbose: bool,
) -> None:
    from rich.text import Text

    from knorm.cli.tables import damage_line, damage_table, print_text, print_wrapped, show_methods

    show_methods(console, rows, failed, title, {}, prompt_length=prompt, verbose=verbose)
    print_text(console, Text("\nNoise in each condition, and how near the engine is to transformers:"))
    console.print(
        damage_table(
            [damage_line(x.label, x.damage, x.bytes_per_token, float(x.tokens_seen.mean()), "") for x in beside]
        )
    )
    for row in beside:
        print_wrapped(console, f"{row.label}: {row.check}", "dim")
