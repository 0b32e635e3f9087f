"""`janus-mega data inspect`, `verify`, `doctor` and `verify-vq`: what shards hold, and whether they are whole."""

from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.errors import UserError

PROBLEMS_CODE = 1
_Json = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]
_Directory = Annotated[Path, typer.Argument(metavar="DIRECTORY", help="A directory of shards.")]


shards_app = typer.Typer(rich_markup_mode=None)


@shards_app.command()
def inspect(
    source: _Directory,
    examples: Annotated[int, typer.Option(help="Samples to show.")] = 3,
    uid: Annotated[str, typer.Option(help="32 hex digits: show the samples with this uid.")] = "",
    as_json: _Json = False,
) -> None:
    """Tell what a directory of shards holds, from its manifest and index."""
    import json

    from data_pipeline.explain.inspection import inspect_source, inspection_lines

    found = inspect_source(source, examples, uid)
    for line in [json.dumps(found, indent=2)] if as_json else inspection_lines(found):
        print(line)


@shards_app.command()
def verify(
    source: _Directory,
    text_tokenizer: Annotated[Path | None, typer.Option(help="Text tokenizer the ids should come from.")] = None,
    image_tokenizer: Annotated[Path | None, typer.Option(help="Image tokenizer the ids should come from.")] = None,
    as_json: _Json = False,
) -> None:
    """Compare every shard, sample and index entry with what was written; exit code 1 and a table of all problems."""
    import dataclasses
    import json

    from data_pipeline.explain.lines import verification_lines
    from data_pipeline.explain.verify import verify_source
    from janus_mega.observe.progress import Progress

    text_digest = image_digest = ""
    if text_tokenizer is not None:
        from data_pipeline.text.load import load_text_tokenizer

        text_digest = load_text_tokenizer(text_tokenizer).digest
    if image_tokenizer is not None:
        from janus_mega.models.vision.image_tokenizer import load_image_tokenizer

        image_digest = load_image_tokenizer(image_tokenizer).digest
    with Progress("verify", 0) as progress:
        found = verify_source(source, text_tokenizer=text_digest, image_tokenizer=image_digest, progress=progress.reach)
    lines = [json.dumps(dataclasses.asdict(found), indent=1)] if as_json else verification_lines(found)
    for line in lines:
        print(line)
    if found.problems:
        raise typer.Exit(PROBLEMS_CODE)


@shards_app.command()
def doctor(
    paths: Annotated[list[Path], typer.Argument(metavar="TAR|DIRECTORY...", help="Anybody's tars.")],
    decode: Annotated[bool, typer.Option("--decode", help="Decode every picture, not only its header.")] = False,
    max_member_mib: Annotated[int, typer.Option(help="Larger members are reported and not read.")] = 256,
    limit: Annotated[int, typer.Option(help="Findings of one kind and shard that --json lists.")] = 1000,
    as_json: _Json = False,
) -> None:
    """Find and explain what webdataset swallows; exit code 1 if anything costs samples or safety."""
    import json

    from data_pipeline.explain.doctor import examine, report_values
    from data_pipeline.explain.lines import doctor_lines
    from data_pipeline.explain.member_checks import CheckOptions
    from janus_mega.observe.progress import Progress

    for name, value in (("--max-member-mib", max_member_mib), ("--limit", limit)):
        if value < 1:
            raise UserError(f"{name} {value} must be at least 1")
    options = CheckOptions(decode=decode, max_member_bytes=max_member_mib << 20, limit=limit)
    with Progress("doctor", 0) as progress:
        report = examine(paths, options, progress.reach)
    for line in [json.dumps(report_values(report), indent=1)] if as_json else doctor_lines(report):
        print(line)
    if report.findings.num_harmful:
        raise typer.Exit(PROBLEMS_CODE)


@shards_app.command("verify-vq")
def verify_vq(
    source: _Directory,
    image_tokenizer: Annotated[Path, typer.Option(help="Directory of the image tokenizer the ids come from.")],
    images: Annotated[
        list[Path], typer.Option(help="Where the pictures are: a directory of shards, or raw records; may be repeated.")
    ],
    sample: Annotated[int, typer.Option(help="Pictures to encode again.")] = 200,
    seed: Annotated[int, typer.Option(help="Which pictures.")] = 0,
    min_agreement: Annotated[float, typer.Option(help="Exit code 1 below this share of equal ids.")] = 0.99,
    as_json: _Json = False,
) -> None:
    """Encode a sample of the pictures again: share of equal ids, and how close the decoded ids come to the pictures."""
    import json

    from data_pipeline.explain.vq_check import check_image_ids, vq_lines, vq_values
    from janus_mega.models.vision.image_tokenizer import load_image_tokenizer
    from janus_mega.observe.progress import Progress

    tokenizer = load_image_tokenizer(image_tokenizer)
    with Progress("verify-vq", 0) as progress:
        found = check_image_ids(source, tokenizer, images, num_pictures=sample, seed=seed, progress=progress.reach)
    for line in [json.dumps(vq_values(found), indent=1)] if as_json else vq_lines(found):
        print(line)
    if found.agreement < min_agreement:
        raise typer.Exit(PROBLEMS_CODE)
