"""`knorm ppl http://HOST:PORT/v1#MODEL ...`: what the cache of a server costs in quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knorm.cli.engined import EngineOptions
from knorm.cli.options import ModelOptions, make_console, waiting
from knorm.cli.setting import TextOptions

if TYPE_CHECKING:
    from rich.console import Console

    from knorm.engines.endpoint import Endpoint
    from knorm.engines.endpoint_ways import EndpointWays, Measured

NO_REFERENCE = (
    "what a server's cache costs is told beside a full cache: give --reference URL, a server of the same model with "
    "the full cache, or --model, the same weights in transformers, or both"
)


def compare_endpoints(
    targets: Sequence[str],
    how: str,
    prompt_length: int | None,
    text_options: TextOptions,
    model_options: ModelOptions | None,
    engine_options: EngineOptions,
    *,
    plot: Path | None,
    quiet: bool,
    verbose: bool,
) -> tuple[bool, dict[str, Any]]:
    """Measure and show; True, and the results as JSON has them.

    Args:
        targets: endpoints.
        how: as --how.
        prompt_length: tokens of the prompt; by default half a window.
        text_options: the text.
        model_options: the same weights in transformers; None where --model is not given.
        engine_options: of the reference, and how long an answer may take.
        plot: a figure's file, which is refused.
        quiet: print nothing.
        verbose: show quantiles too.

    Returns:
        True and the fields.

    Raises:
        ValueError: what cannot be asked, or a server does in place of answering; in one line.
    """
    if how == "schedule":
        raise ValueError("a server has no schedule: give --how loop, 'two calls' or auto")
    if plot:
        raise ValueError("--plot draws losses by bytes of cache, which servers seldom tell: drop it, or give --json")
    if not (model_options or engine_options.reference):
        raise ValueError(NO_REFERENCE)
    prompt = text_options.window // 2 if prompt_length is None else prompt_length
    console = make_console(quiet)
    endpoints, reference = asked_servers(targets, engine_options, text_options.window)
    with waiting():
        ways = _ways(endpoints[0], reference, text_options, model_options, prompt, how)
    with waiting("Scoring"):
        measured = ways.measure(endpoints)
    count, length = ways.ids.shape
    full = _told(reference) if reference else f"transformers with {_name(model_options)}"
    title = f"{_told(endpoints[0])} on {text_options.text}: "
    title += f"{'1 window' if count == 1 else f'{count} windows'} of {length} tokens, prompt {prompt}"
    _show(console, ways, measured, f"{title}\nCompared with: {full}", prompt, verbose=verbose)
    from knorm.cli.compared import row_fields

    options = model_options or ModelOptions(endpoints[0].model, "unknown", "unknown")
    fields = {
        **asdict(options), **asdict(replace(text_options, batch=1)), "prompt_length": prompt,
        "rows": [row_fields(row) for row in measured.rows], "failed": {}, "facts": {},
        "engine": _engine_fields(endpoints[0], ways, measured, full),
    }  # fmt: skip
    return True, fields


def asked_servers(
    targets: Sequence[str], options: EngineOptions, window: int
) -> tuple[list[Endpoint], Endpoint | None]:
    """Ask all servers which model they serve, before anything heavy is loaded; the second is --reference."""
    with waiting("Asking the server"):
        from knorm.engines.http import read_address
        from knorm.engines.llama_server import endpoint_at

        addresses = [read_address(target) for target in targets]
        other = read_address(options.reference) if options.reference else None
        endpoints = [endpoint_at(address, options.engine_limit) for address in addresses]
        reference = endpoint_at(other, options.engine_limit) if other else None
        for each in (*endpoints, *([reference] if reference else [])):
            each.check_context(window)
    return endpoints, reference


def _engine_fields(first: Endpoint, ways: EndpointWays, measured: Measured, full: str) -> dict[str, Any]:
    from knorm.cli.compared import row_fields

    return {
        "name": first.spec, "package": "", "version": first.software, "system": ways.sees, "full": full,
        "python": None, "beside": [row_fields(row) for row in measured.beside],
    }  # fmt: skip


def _ways(
    first: Endpoint,
    reference: Endpoint | None,
    text_options: TextOptions,
    model_options: ModelOptions | None,
    prompt: int,
    how: str,
) -> EndpointWays:
    from knorm.engines.endpoint_ways import EndpointWays, windows_by
    from knorm.evaluation.windows import cut_windows
    from knorm.models import load_text

    text = load_text(text_options.text, text_options.column)
    model = None
    if model_options:
        model, tokenizer = model_options.load()
        windows = cut_windows(tokenizer, text, text_options.window, text_options.windows)
    else:
        windows = windows_by(first, text, text_options.window, text_options.windows)
    way: Any = None if how == "auto" else how
    return EndpointWays(windows, prompt, model=model, reference=reference, how=way)


def _told(endpoint: Endpoint) -> str:
    said = [endpoint.software or "unknown software"]
    if endpoint.kind:
        said.append(f"cache type {endpoint.kind}")
    return f"{endpoint.spec} ({', '.join(said)})"


def _name(options: ModelOptions | None) -> str:
    return f"the weights of {options.model} in {options.dtype}" if options else ""


def _show(console: Console, ways: EndpointWays, measured: Measured, title: str, prompt: int, *, verbose: bool) -> None:
    from rich.text import Text

    from knorm.cli.tables import damage_table, evaluation_line, print_text, print_wrapped, show_methods

    show_methods(console, measured.rows, {}, title, {}, prompt_length=prompt, verbose=verbose)
    print_wrapped(console, f"{ways.sees[0].upper()}{ways.sees[1:]}.")
    print_text(console, Text("\nNoise in each condition, and how near the reference is to transformers:"))
    console.print(damage_table([evaluation_line(row, "") for row in measured.beside]))
    for row in measured.beside:
        print_wrapped(console, f"{row.label}: {row.check}", "dim")
