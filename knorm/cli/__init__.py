"""The commands, a module each. Everything heavy is imported when a command needs it."""

from __future__ import annotations

import sys
import traceback

import click

from knorm import __version__
from knorm.cli import bench, check, explain, golden, init, outputs, page, ppl, sweep, verify
from knorm.cli.options import BROKEN, WRONG_USAGE, visible


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
@click.pass_context
def cli(context: click.Context, verbose: bool) -> None:
    """Is a compressed KV cache correct, and did anything move?

    Exit code 0: all holds. 1: something was refuted or moved. 2: wrong usage. 3: knorm itself failed.
    """
    context.obj = verbose


for command in (
    verify.verify, check.check, ppl.ppl, explain.explain, bench.bench, golden.golden, sweep.sweep, page.page,
    init.init,
):  # fmt: skip
    cli.add_command(command)


def main() -> None:
    """Run a command; wrong input is one line and exit code 2, with -v a traceback; a bug of knorm's own always one."""
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Abort:  # Ctrl-C
        kept = ", ".join(map(str, outputs.WRITTEN))
        click.echo(f"knorm: interrupted; {f'written before: {kept}' if kept else 'nothing was written'}", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (ValueError, TypeError, OSError) as error:
        if {"-v", "--verbose"} & set(sys.argv[1:2]):
            traceback.print_exc()
            sys.exit(WRONG_USAGE)
        click.echo(f"knorm: {visible(str(error))}", err=True)
        sys.exit(WRONG_USAGE)
    except Exception:  # Python's own exit code would be 1: refuted
        traceback.print_exc()
        sys.exit(BROKEN)
