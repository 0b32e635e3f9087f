"""The tree of a demo run, and the configurations of its parts with paths into that tree.

raw/                  pictures and JSON lines (`raw`)
text_tokenizer/       text.model
image_tokenizer/      a run directory; image_tokenizer/image_tokenizer is the frozen tokenizer
shards/<source>/      what the prepare commands wrote
stage1/ ... stage3/   run directories: config, metrics, events, checkpoints
drawings/, items/     what was drawn and answered, item by item
export/               the Hugging Face directory
events/               TensorBoard pictures
report.json, report.html
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.errors import UserError
from janus_mega.config.load import load_config
from janus_mega.config.schema import RunConfig, TokenizerRunConfig

STAGES = ("stage1", "stage2", "stage3")
MARKER = "demo.txt"
"""Marks a directory as a demo's own, to be replaced by the next run."""
SHORT_STEPS = {"image_tokenizer": 40, "stage1": 6, "stage2": 20, "stage3": 20}
"""Steps of a short run: every part works, nothing is learnt well."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """Paths of one run."""

    root: Path

    @property
    def raw(self) -> Path:
        """Raw files."""
        return self.root / "raw"

    @property
    def text_tokenizer(self) -> Path:
        """The sentencepiece model."""
        return self.root / "text_tokenizer" / "text.model"

    @property
    def image_tokenizer_run(self) -> Path:
        """Run directory of the image tokenizer's training."""
        return self.root / "image_tokenizer"

    @property
    def image_tokenizer(self) -> Path:
        """The frozen image tokenizer."""
        return self.image_tokenizer_run / "image_tokenizer"

    def shards(self, source: str) -> Path:
        """Shards of a source."""
        return self.root / "shards" / source

    def stage(self, name: str) -> Path:
        """Run directory of a stage."""
        return self.root / name

    @property
    def drawings(self) -> Path:
        """Drawn pictures."""
        return self.root / "drawings"

    @property
    def items(self) -> Path:
        """Item-level records and the pictures that the page shows."""
        return self.root / "items"

    @property
    def export(self) -> Path:
        """The Hugging Face directory."""
        return self.root / "export"

    @property
    def events(self) -> Path:
        """TensorBoard pictures."""
        return self.root / "events"


def open_workspace(root: Path) -> Workspace:
    """An empty workspace; an earlier demo's directory is replaced.

    Raises:
        UserError: the directory holds something that no demo has written.
    """
    if root.exists() and any(root.iterdir()):
        if not (root / MARKER).is_file():
            raise UserError(f"{root}: holds files of something else (no {MARKER}); give an empty or new directory")
        shutil.rmtree(root)
    root.mkdir(parents=True, exist_ok=True)
    (root / MARKER).write_text("A run of `janus-mega demo`; the next one replaces this directory.\n", encoding="utf-8")
    return Workspace(root)


def image_tokenizer_config(workspace: Workspace, short: bool) -> TokenizerRunConfig:
    """configs/demo/image_tokenizer.yaml in this workspace."""
    config = load_config(TokenizerRunConfig, "demo/image_tokenizer.yaml").config
    return replace(
        config,
        run_dir=str(workspace.image_tokenizer_run),
        data=replace(config.data, path=str(workspace.raw / "captions.jsonl")),
        num_steps=SHORT_STEPS["image_tokenizer"] if short else config.num_steps,
    )


def stage_config(workspace: Workspace, stage: str, short: bool, init_from: str = "") -> RunConfig:
    """configs/demo/<stage>.yaml in this workspace, starting from the checkpoint `init_from`."""
    config = load_config(RunConfig, f"demo/{stage}.yaml").config
    sources = {
        name: replace(source, path=str(workspace.shards(Path(source.path).name)))
        for name, source in config.data.sources.items()
    }
    num_steps = SHORT_STEPS[stage] if short else config.stage.num_steps
    warmup_steps = min(config.optimizer.warmup_steps, num_steps)
    return replace(
        config,
        optimizer=replace(config.optimizer, warmup_steps=warmup_steps),
        run_dir=str(workspace.stage(stage)),
        data=replace(
            config.data,
            sources=sources,
            text_tokenizer=str(workspace.text_tokenizer),
            image_tokenizer=str(workspace.image_tokenizer),
        ),
        stage=replace(
            config.stage,
            init_from=init_from,
            num_steps=num_steps,
        ),
    )
