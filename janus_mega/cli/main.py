"""The command `janus-mega`. Heavy imports stand inside commands, so that `--help` answers at once.

Exit codes: 0 done; 2 bad input, told in one line; those of training that was stopped are in `train.exits`; anything
else with a traceback is a defect.
"""

import signal
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.errors import UserError
from janus_mega import __version__
from janus_mega.cli.checkpoint import checkpoint_app
from janus_mega.cli.data import data_app
from janus_mega.cli.estimate import estimate_app
from janus_mega.cli.stages import stages_app
from janus_mega.cli.tokenizer import tokenizer_app
from janus_mega.cli.verify import verify_app

DEMO_DIR = Path("runs/demo")

ConfigFile = Annotated[str, typer.Argument(metavar="FILE", help="YAML of a run: a path, or a name under configs/.")]
Checkpoint = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="A step directory, or a run directory: its newest checkpoint.")
]
Ema = Annotated[bool, typer.Option("--ema", help="Take the moving average of the weights.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override values of the file.")]

app = typer.Typer(
    name="janus-mega",
    help="Pretrains Janus-style models: images in, images out and text, in one transformer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(data_app, name="data")
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(verify_app)
app.add_typer(estimate_app)
app.add_typer(stages_app)


def main() -> None:
    """Runs the command line; bad input ends in one line and exit code 2."""
    _silence_libraries()
    try:
        app(prog_name="janus-mega")
    except Exception as error:
        from janus_mega.train.exits import BAD_INPUT, exit_code_of

        code = exit_code_of(error)
        if code is None:
            raise
        print(f"janus-mega: {error}", file=sys.stderr)
        if code != BAD_INPUT:
            # A launcher that sees one rank end sends these to the others, which would hide their code.
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
        sys.exit(code)


def _silence_libraries() -> None:
    """Hides what libraries say about each other and a user can do nothing about."""
    # Kernels that are not installed have replacements; megatron-core says so in many lines on every import.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    # megatron-core and DeepSpeed call collectives by names that torch is about to change; once per call.
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the command itself."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory of the run; an earlier demo there is replaced.")] = DEMO_DIR,
    short: Annotated[bool, typer.Option("--short", help="A few steps only, to see that every part works.")] = False,
    seed: Annotated[int, typer.Option(help="Of documents, pairs and questions.")] = 0,
) -> None:
    """Train, judge and export a small Janus on real handwritten digits."""
    from rich.console import Console

    from janus_mega.demo.run import run_demo
    from janus_mega.observe.log import setup_logging

    setup_logging()
    result = run_demo(out, short=short, seed=seed)
    Console().print(result.table)
    print(f"{result.num_missed} targets missed{' (a short run trains too little to meet them)' if short else ''}")
    print(result.report_html)


@app.command()
def config(
    file: ConfigFile,
    overrides: Overrides = None,
    world_size: Annotated[int, typer.Option(help="Ranks that the rules are checked for.")] = 1,
    explain: Annotated[bool, typer.Option("--explain", help="Also print what each value means.")] = False,
) -> None:
    """Show the resolved configuration with the origin of every value, and check its rules."""
    from janus_mega.cli.show import config_lines
    from janus_mega.config.load import resolve_any
    from janus_mega.config.validate import validate_any

    resolved = resolve_any(file, overrides or [])
    for line in config_lines(resolved, explain=explain):
        print(line)
    validate_any(resolved.config, world_size)


@app.command()
def train(
    file: ConfigFile,
    overrides: Overrides = None,
    ranks: Annotated[
        int, typer.Option(help="Processes to start on this machine; torchrun and srun start their own.")
    ] = 1,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh", help="Begin at step 0 although the run directory was used; its checkpoints stay, set aside."
        ),
    ] = False,
) -> None:
    """Train one stage of a Janus; an interrupted run continues where its newest checkpoint stands."""
    from janus_mega.cli.launched import take_srun_place
    from janus_mega.cli.ranks import on_ranks, started_world_size
    from janus_mega.config.load import load_config
    from janus_mega.config.schema import RunConfig
    from janus_mega.config.validate import validate_run

    take_srun_place()
    config = load_config(RunConfig, file, overrides or []).config
    validate_run(config, started_world_size(ranks))

    from janus_mega.train.janus import train_janus

    on_ranks(partial(train_janus, fresh=fresh), config, ranks, config.parallel.torch_threads)


@app.command()
def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    dtype: Annotated[str, typer.Option(help="Number format: float32, bfloat16 or float16.")] = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the directory if it exists.")] = False,
    ema: Ema = False,
) -> None:
    """Write a checkpoint as a Hugging Face directory that transformers alone loads."""
    from janus_mega.checkpoint.hf.export import export_hf
    from janus_mega.checkpoint.trained import open_trained
    from janus_mega.cli.paths import checkpoint_at

    trained = open_trained(checkpoint_at(checkpoint), averaged=ema)
    print(export_hf(trained, out, dtype=dtype, overwrite=overwrite))


@app.command()
def generate(
    checkpoint: Checkpoint,
    caption: Annotated[list[str] | None, typer.Option(help="Draw this; may be repeated.")] = None,
    question: Annotated[str | None, typer.Option(help="Answer this.")] = None,
    beginning: Annotated[str | None, typer.Option(help="Continue this text.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="Picture that the question is about; may be repeated.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory for drawn pictures.")] = Path("drawn"),
    guidance: Annotated[float, typer.Option(help="Guidance scale of drawing; 1 is without.")] = 5.0,
    temperature: Annotated[
        float | None, typer.Option(help="0 takes the likeliest; default 1 to draw, 0 to write.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 128,
    seed: Annotated[int, typer.Option(help="Fixes every draw.")] = 0,
    ema: Ema = False,
) -> None:
    """Draw captions, answer a question about pictures, or continue a text."""
    if bool(caption) + bool(question) + bool(beginning) != 1:
        raise UserError("generate needs exactly one of --caption, --question and --beginning; give one of them")

    from janus_mega.cli.generation import draw_captions, write_answer
    from janus_mega.cli.paths import checkpoint_at
    from janus_mega.infer.model import load_trained

    model = load_trained(checkpoint_at(checkpoint), averaged=ema)
    if caption:
        drawn_at = 1.0 if temperature is None else temperature
        for path in draw_captions(model, caption, out, guidance_scale=guidance, temperature=drawn_at, seed=seed):
            print(path)
    else:
        written_at = 0.0 if temperature is None else temperature
        prompt = (question, beginning, image or [])
        print(write_answer(model, *prompt, max_new_tokens=max_new_tokens, temperature=written_at, seed=seed))


@app.command()
def describe(
    what: Annotated[str, typer.Argument(metavar="WHAT", help="A checkpoint, a run directory, or a YAML with a model.")],
    world_size: Annotated[int, typer.Option(help="Ranks that a run is described for.")] = 1,
) -> None:
    """Tell what a checkpoint holds, or what a configuration will build."""
    from janus_mega.cli.show import checkpoint_lines, config_summary_lines

    if Path(what).is_dir():
        from janus_mega.checkpoint.reader import open_checkpoint
        from janus_mega.cli.paths import checkpoint_at

        lines = checkpoint_lines(open_checkpoint(checkpoint_at(Path(what))))
    else:
        lines = config_summary_lines(what, world_size)
    for line in lines:
        print(line)


if __name__ == "__main__":
    main()
