"""Results to a record: the tables, the targets, and how all of it was measured."""

from collections.abc import Iterable
from typing import Any

from tools.bench_data.clock import Spread, spread
from tools.bench_data.suites import OURS, PHOTO_SETS, ROWS, SEQUENCE
from tools.benchmark import TINY_RUN

_METHOD = """\
One process per system, all pinned to the same core, one thread; 1 warm-up and {repeats} repeats in turns; medians with
first and third quartile. Times are processor time of the process tree unless wall is said. Everything lies in the page
cache: nothing here speaks of object stores or network file systems, and one core shows no scaling. All data is made by
the tool from a seed (tools/bench_data/raw.py); that all systems hold the same ids and the same pictures is checked
before anything is measured. Energon reads pictures with its garbage collection off, tokens both ways."""

_TOKENS = """\
{drawings} drawings (576 image ids and a caption) and {texts} texts in random order. Rows of ours are packed to 4096
tokens, labelled, checked against crc32 and hold {padding:.2%} padding; they are read 8 at a time, as the loader asks
for them, and compiling the plan is within the time. The others are measured at their samples, decoded and not packed,
which favours them. Useful tokens are stored ids: padding and dialogue tokens count for nobody. Compiling the plan is a
part of the first line; the loader adds torch's DataLoader and torch batches. Samples in sequence are views of what
was read; laid into rows they are copied once."""

_IMAGES = """\
JPEG (quality 90) to uint8 384 px: long side 384, gray around. `Pillow` is each library's documented way with Pillow's
bicubic filter; `our decoding` hands the stored bytes to our decode and resize. The photos are crops of two photographs,
scaled and given grain, with {per_pixel} bytes a pixel; other pictures decode at other speeds."""


def write(results: dict[str, Any]) -> str:
    """The record as Markdown."""
    parts = [
        f"# Data loading side by side, {results['hardware']}, {results['date']}",
        f"Commit {results['commit']}, written by tools/bench_data: `{results['command']}`, {results['seconds']:.0f} s.",
    ]
    if results["tiny"]:
        parts.append(TINY_RUN)
    parts.append(_METHOD.format(repeats=results["sizes"]["repeats"]))
    parts += [_table(("figure", "reached", "target", "met"), _targets(results))]
    parts += ["## Tokens: random order, packed", _tokens_text(results), _tokens_table(results)]
    parts += ["## Images to 384 px", _images_text(results), *(_photos_table(results, name) for name in PHOTO_SETS)]
    parts += ["## Disk, conversion, random access", *_disk(results)]
    parts += ["## Resume and first batch", _resume(results)]
    parts += ["## Offline encoding", _encoding(results)]
    parts += ["## Limits of this machine", _limits(results)]
    parts += ["## Versions and load", _versions(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def summary(results: dict[str, Any]) -> list[str]:
    """The targets, one line each, for the terminal."""
    return [": ".join(row[:2]) + f" (target {row[2]}, met: {row[3]})" for row in _targets(results)]


def _table(head: tuple[str, ...], rows: Iterable[Iterable[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _number(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _quartiles(of: Spread) -> str:
    return f"{_number(of.median)} ({_number(of.low)} - {_number(of.high)})"


def _per(answers: list[Any], count: str, seconds: str = "cpu_s") -> Spread:
    """Microseconds per sample or nanoseconds per id."""
    unit = 1e9 if count == "ids" else 1e6
    return spread([answer[seconds] / answer[count] * unit for answer in answers])


def _rate(answers: list[Any], count: str = "samples") -> Spread:
    return spread([answer[count] / answer["cpu_s"] for answer in answers])


def _targets(results: dict[str, Any]) -> list[list[str]]:
    """Every figure beside its target; figures whose peers took no part are left out."""
    tokens = {title: _per(given, "samples").median for title, given in results["tokens"].items()}
    per_id = {title: _per(given, "ids").median for title, given in results["tokens"].items()}
    usual = "webdataset, one sample a key"
    rows = [_at_most("CPU us per token sample", tokens[ROWS], 5)]
    if SEQUENCE in per_id:
        rows.append(
            _at_most("time per useful token over that of our bytes in sequence", per_id[ROWS] / per_id[SEQUENCE], 2)
        )
    if usual in tokens:
        rows.append(_at_least("webdataset's usual layout, time over ours", tokens[usual] / tokens[ROWS], 20))
    if "litdata" in tokens:
        rows.append(_at_least("litdata, time over ours", tokens["litdata"] / tokens[ROWS], 1))
    for photos in PHOTO_SETS:
        rates = {title: _rate(given).median for title, given in results[photos].items()}
        if "webdataset, Pillow" in rates:
            ratio = rates[OURS] / rates["webdataset, Pillow"]
            rows.append(_at_least(f"{photos}: images/s over webdataset's documented way", ratio, 2))
    ratio = spread([answer["prepare"] / answer["bare"] for answer in results["encoding"]]).median
    rows.append(_at_least("offline encoding over the bare forward pass", ratio, 0.9))
    rows.append(_at_most("bytes on disk per drawing, captions not counted", results["drawing_bytes"]["ids"], 1300))
    return rows


def _at_most(name: str, reached: float, bound: float) -> list[str]:
    return [name, _number(reached), f"<= {bound:g}", "yes" if reached <= bound else "**no**"]


def _at_least(name: str, reached: float, bound: float) -> list[str]:
    return [name, _number(reached), f">= {bound:g}", "yes" if reached >= bound else "**no**"]


def _tokens_text(results: dict[str, Any]) -> str:
    sizes = results["sizes"]
    return _TOKENS.format(drawings=sizes["drawings"], texts=sizes["texts"], padding=results["padding"])


def _tokens_table(results: dict[str, Any]) -> str:
    head = ("", "CPU us/sample", "wall us/sample", "ns/useful token", "M useful tokens/s")
    rows = []
    for title, given in results["tokens"].items():
        per_second = spread([answer["ids"] / answer["cpu_s"] / 1e6 for answer in given])
        columns = (_per(given, "samples"), _per(given, "samples", "wall_s"), _per(given, "ids"), per_second)
        rows.append([title, *map(_quartiles, columns)])
    return _table(head, rows)


def _images_text(results: dict[str, Any]) -> str:
    sizes = results["photo_bytes_per_pixel"]
    return _IMAGES.format(per_pixel=" and ".join(f"{sizes[name]:.2f}" for name in PHOTO_SETS))


def _photos_table(results: dict[str, Any], photos: str) -> str:
    ways = results["limits"]["pictures/s"][photos]
    rows = [[title, _quartiles(_rate(given))] for title, given in results[photos].items()]
    rows += [[f"*limit: {way}*", _number(rate)] for way, rate in ways.items()]
    return _table((f"{photos}, {results['sizes']['photos']} files", "images/s per core"), rows)


def _disk(results: dict[str, Any]) -> list[str]:
    token_count, photo_count = results["sums"][0], results["sizes"]["photos"]
    rows = []
    for title, tokens in results["conversion tokens"].items():
        photos = results["conversion photos512"].get(title)
        access = results["access"].get(title)
        row = [title, _number(tokens["bytes"] / token_count), _number(tokens["index"] / token_count)]
        row.append(_number(tokens["cpu_s"] / token_count * 1e6))
        each = (photos["bytes"] / photo_count, photos["cpu_s"] / photo_count * 1e6) if photos else ()
        row += [_number(value) for value in each] or ["-", "-"]
        rows.append([*row, _quartiles(_per(access, "samples")) if access else "none"])
    head = (
        "",
        "bytes/token sample",
        "of it index",
        "conversion, CPU us",
        "bytes/photo of 512 px",
        "conversion, CPU us",
        "random read of a token sample, CPU us",
    )
    drawing = results["drawing_bytes"]
    return [
        _table(head, rows),
        "Converting is not the same work everywhere: ours tokenizes text, decodes every picture, and hashes shards and "
        "samples; the peers are given ids and bytes. Random reads of ours are checked against crc32. A drawing of ours "
        "takes "
        f"{drawing['all']:.0f} bytes on disk with caption and index, {drawing['ids']:.0f} without the caption's ids.",
    ]


def _resume(results: dict[str, Any]) -> str:
    rows = []
    for title, given in results["first"].items():
        first = spread([answer["wall_s"] * 1e3 for answer in given])
        resume = results["resume"].get(title, {"not_offered": "failed"})
        if "not_offered" in resume:
            rows.append([title, _quartiles(first), "-", "-", resume["not_offered"]])
            continue
        exact = "yes" if resume["exact"] else "**no**"
        rows.append([title, _quartiles(first), str(resume["bytes"]), _number(resume["wall_s"] * 1e3), exact])
    head = ("", "open to first batch, wall ms", "bytes of state", "restore to next batch, wall ms", "same batches")
    text = (
        "State is saved in one process after half the epoch and restored in a new one (imports not counted); `same "
        "batches` compares hashes of the three batches that follow. A batch of ours is 8 rows of 4096 tokens, of the "
        "others 64 samples. One world, no workers: restoring under another world size or number of workers is not "
        "compared here."
    )
    return _table(head, rows) + "\n\n" + text


def _encoding(results: dict[str, Any]) -> str:
    bare = spread([answer["bare"] for answer in results["encoding"]])
    inside = spread([answer["prepare"] for answer in results["encoding"]])
    return (
        f"Image tokenizer alone {_quartiles(bare)} pictures/s per core, `prepare_t2i` with it {_quartiles(inside)} "
        f"({results['sizes']['encoded']} photos of 512 px, 384 px and 576 ids, untrained weights of 32 base channels: "
        "the published width of 128 is slower and hides more). On a GPU the forward pass is far shorter, and decoding "
        "needs processes of its own."
    )


def _limits(results: dict[str, Any]) -> str:
    rates = [
        [f"our tars from the page cache: {name}", f"{rate:.2f} GB/s"]
        for name, rate in results["limits"]["GB/s"].items()
    ]
    return _table(("", "one core"), rates)


def _versions(results: dict[str, Any]) -> str:
    lines = [
        f"* {name}: " + ", ".join(f"{package} {number}" for package, number in versions.items())
        for name, versions in results["versions"].items()
        if versions
    ]
    load = ", ".join(f"{what} {value:.2f}" for what, value in results["load"].items())
    failed = [f"* left out: {line}" for line in results["failures"]]
    return "\n".join([f"* {results['machine']}", *lines, *failed, f"* load average before: {load}"])
