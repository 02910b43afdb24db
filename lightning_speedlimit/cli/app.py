"""The commands with their options and help; what they do is in a file each, imported when it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

By = Literal["loss", "step", "time"]  # as in report.alignment, which would cost the help half a second
Cost = Literal["steps", "samples", "tokens", "epochs", "seconds"]  # as in report.costs

EXAMPLES = {
    "demo": ("speedlimit demo", "speedlimit demo --quick --output tried"),
    "show": ("speedlimit show runs/adamw/seed_0", "speedlimit show runs", "speedlimit show runs/sgd/seed_0 --json"),
    "watch": ("speedlimit watch runs/adamw/seed_0", "speedlimit watch runs --once"),
    "advise": ("speedlimit advise runs/adamw/seed_0", "speedlimit advise runs/sgd/seed_0 --times runs --json"),
    "compare": (
        "speedlimit compare runs",
        "speedlimit compare runs/sgd runs/adamw --by step --at 40",
        "speedlimit compare runs/sgd runs/adamw --cost samples",
        "speedlimit compare runs/sgd/seed_0@0:40 runs/sgd/seed_0@40:80 --by step",
        "speedlimit compare --group plain=runs/sgd --group adaptive=runs/adamw",
        "speedlimit compare runs --html report.html",
        "speedlimit compare runs models --split --json",
    ),
    "gradient-flow": ("speedlimit theory gradient-flow --eigenvalues 1,0.1 --residual 1,1 --times 0,1,10,100",),
    "langevin": (
        "speedlimit theory langevin --curvature 1 --mean 1 --std 1 --temperature 0.5 --times 0.1,1,10",
        "speedlimit theory langevin --curvature 1,4 --mean 0,2 --std 1 --temperature 1 --times 1 --json",
    ),
    "power-law": (
        "speedlimit theory power-law --kernel-exponent 1.5 --residual-exponent 0.5 --modes 100000 --times 1e1,1e2,1e3",
    ),
}


def _examples(command: str) -> str:
    """Lines that the help does not wrap."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in EXAMPLES[command])])


app = typer.Typer(
    help="How close training runs came to the thermodynamic speed limit, and how they compare.",
    epilog="""\b
Examples:
  speedlimit demo
  speedlimit compare runs --html report.html

Start with the demo: it trains a few small networks and shows what there is to see. Completion of your shell:
speedlimit --install-completion.""",
    no_args_is_help=True,
    rich_markup_mode=None,  # examples without a frame around them, to be copied
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
theory = typer.Typer(
    help="Closed forms: what an exact run would show. Lists are numbers with commas between.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(theory, name="theory")


def _place(text: str) -> Path:
    """Else "" would be the working directory."""
    from lightning_speedlimit.checks import arguments
    from lightning_speedlimit.cli.complaints import from_user

    with from_user():
        return arguments.path("a path", text)


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else; undefined values are null.")]
Times = Annotated[str, typer.Option(help="Times, in units of learning rate x steps.", metavar="T,T,..")]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            found = version("lightning-speedlimit")
        except PackageNotFoundError:
            found = "of a source folder that is not installed"
        typer.echo(f"speedlimit {found}")
        raise typer.Exit


@app.callback()
def speedlimit(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)] = (
        False
    ),
) -> None:
    """What all commands have in common: nothing but the version."""


@app.command(epilog=_examples("demo"))
def demo(
    output: Annotated[
        Path, typer.Option(help="Folder for the records and the page.", metavar="FOLDER", parser=_place)
    ] = Path("speedlimit_demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Few steps of two optimizers, to see that it works.")] = False,
) -> None:
    """Train small networks with several optimizers and compare them.

    On a free core it takes half a minute. It downloads nothing: the data are the handwritten digits of scikit-learn
    where that is installed, else two spirals.
    """
    from lightning_speedlimit.cli.demonstration import demonstrate

    demonstrate(output, quick=quick)


@app.command(epilog=_examples("show"))
def show(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or one that holds runs.", metavar="RUN", parser=_place)],
    layers: Annotated[
        bool, typer.Option("--layers", help="And each layer: how far it moved, whether it turned, its noise.")
    ] = False,
    json: AsJson = False,
) -> None:
    """Show what one run did: its numbers, its regimes, what cost it the most.

    Of a folder that holds several runs, show a line for each (with --json a list).
    """
    from lightning_speedlimit.cli.showing import show_runs

    show_runs(run, layers=layers, json=json)


@app.command(epilog=_examples("watch"))
def watch(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or one that holds runs.", metavar="RUN", parser=_place)],
    once: Annotated[bool, typer.Option("--once", help="Show what there is now, and end.")] = False,
) -> None:
    """Watch a run that is going on: its last rows, where the work goes, what costs the most.

    Ends with the run, or by Ctrl-C, which leaves the training alone. Of a folder that holds several runs, watch the one
    that is going on; where several are, a line for each. Into a pipe, print a line for each new row.
    """
    from lightning_speedlimit.cli.watching import watch_run

    watch_run(run, once=once)


@app.command(epilog=_examples("advise"))
def advise(
    run: Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN", parser=_place)],
    times: Annotated[
        list[Path] | None,
        typer.Option(
            help="Runs of the same model with other batches: their time per step tells the seconds. Again for more.",
            metavar="RUNS",
            show_default=False,
            parser=_place,
        ),
    ] = None,
    json: AsJson = False,
) -> None:
    """Say what other batch sizes would take, in steps and samples, and what the steps say of the learning rate.

    In this order: what the run cost, what it bought, what to change, the physics.
    """
    from lightning_speedlimit.cli.advising import advise_run

    advise_run(run, times or [], json=json)


@app.command(epilog=_examples("compare"))
def compare(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Folders of runs, or that hold runs. Those named alike but for seed_0, seed_1, … are one group. "
            "RUN@1000:2000 is a run from step 1000 to step 2000.",
            metavar="RUN",
            show_default=False,
            parser=_place,
        ),
    ] = None,
    by: Annotated[By, typer.Option(help="Compare at the same loss (the fair one), step, or second of the fit.")] = (
        "loss"
    ),
    at: Annotated[
        float | None,
        typer.Option(
            help="That loss, step or second. Left out: a low loss that most runs reached, or the last step or second "
            "that all have.",
            show_default=False,
        ),
    ] = None,
    cost: Annotated[
        Cost | None,
        typer.Option(
            help="What a loss is paid for with. Left out: samples where the batches differ, else steps.",
            show_default=False,
        ),
    ] = None,
    group: Annotated[
        list[str] | None,
        typer.Option(
            help="A group of replicas with its name, in place of RUN; again for each group, or for more of one.",
            metavar="NAME=PATH",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        bool, typer.Option("--split", help="One comparison for each model (number of parameters); JSON is then a list.")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(help="Write a page with figures to this file.", metavar="FILE", show_default=False, parser=_place),
    ] = None,
    json: AsJson = False,
) -> None:
    """Compare runs: which came how far, at what price, and what wasted the others' work."""
    from lightning_speedlimit.cli.comparing import compare_runs

    compare_runs(runs or [], group or [], by=by, at=at, cost=cost, split=split, html=html, json=json)


@theory.command("gradient-flow", epilog=_examples("gradient-flow"))
def gradient_flow(
    eigenvalues: Annotated[str, typer.Option(help="Of the kernel, one for each mode.", metavar="L,L,..")],
    residual: Annotated[str, typer.Option(help="f - y at the start, in the kernel's eigenbasis.", metavar="R,R,..")],
    times: Times,
    json: AsJson = False,
) -> None:
    """Gradient flow on a quadratic loss: of a linear model, or a wide network."""
    from lightning_speedlimit.cli.closed_forms import print_gradient_flow

    print_gradient_flow(eigenvalues, residual, times, json=json)


@theory.command(epilog=_examples("langevin"))
def langevin(
    curvature: Annotated[str, typer.Option(help="Of the loss, one for each mode or one for all.", metavar="H,H,..")],
    mean: Annotated[str, typer.Option(help="Of the weights at the start.", metavar="M,M,..")],
    std: Annotated[str, typer.Option(help="Standard deviation of the weights at the start.", metavar="S,S,..")],
    temperature: Annotated[float, typer.Option(help="Of the noise, in units of the loss.")],
    times: Times,
    json: AsJson = False,
) -> None:
    """Langevin dynamics on a quadratic loss, from Gaussian weights."""
    from lightning_speedlimit.cli.closed_forms import print_langevin

    print_langevin(curvature, mean, std, temperature, times, json=json)


@theory.command("power-law", epilog=_examples("power-law"))
def power_law(
    kernel_exponent: Annotated[float, typer.Option(help="a: eigenvalues fall as k^-a.")],
    residual_exponent: Annotated[float, typer.Option(help="b: squared residuals fall as k^-b.")],
    modes: Annotated[int, typer.Option(help="Number of modes.")],
    times: Times,
    json: AsJson = False,
) -> None:
    """Gradient flow with power laws for spectrum and residual."""
    from lightning_speedlimit.cli.closed_forms import print_power_law

    print_power_law(kernel_exponent, residual_exponent, modes, times, json=json)
