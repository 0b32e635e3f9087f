"""What the model draws and answers as it trains, at fixed prompts, through the same code that a finished model runs in.

Weights take the road of a checkpoint: all ranks write theirs into the run directory, rank 0 reads them as a model,
draws, and removes them. So every layout can be sampled, and a sample shows what a checkpoint of that step would draw.
It costs a checkpoint without optimizer on the disk, memory for a whole model on rank 0's device, and the other ranks'
patience.
"""

import json
import logging
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image

from data_pipeline.errors import UserError
from data_pipeline.images import understanding_view
from janus_mega.config.schema import SamplesConfig
from janus_mega.infer.model import InferenceModel, load_trained
from janus_mega.observe.lenient import Lenient, write_whole
from janus_mega.observe.sinks import SinkGroup
from janus_mega.observe.stopping import StopFlag
from janus_mega.parallel.groups import ProcessGroups
from janus_mega.train.hooks.drawings import code_use, read_picture, sheet
from janus_mega.train.loop import StepEvent
from janus_mega.train.saving import SaveFailed, Saver

SAMPLES_DIR = "samples"
"""Folder of a run directory that receives drawings and answers."""
_SCRATCH = "weights-"

_log = logging.getLogger(__name__)


class SamplesHook:
    """Writes `samples/step-<step>.{png,json}` and the same to the sinks, every few steps."""

    def __init__(
        self,
        config: SamplesConfig,
        run_dir: Path,
        groups: ProcessGroups,
        sinks: SinkGroup,
        saver: Saver,
        hook_seconds: dict[str, float],
        stop: StopFlag | None = None,
    ) -> None:
        """Reads the pictures of questions.

        Raises:
            UserError: a picture of a question is missing or no picture.
        """
        self._config = config
        self._pictures = [read_picture(path) for path in config.questions]
        self._folder = run_dir / SAMPLES_DIR
        self._weights = Lenient(f"samples in {self._folder}")
        self._files = Lenient(f"files in {self._folder}")
        self._groups = groups
        self._sinks = sinks
        self._saver = saver
        self._hook_seconds = hook_seconds
        self._stop = stop or StopFlag()

    def after_step(self, event: StepEvent) -> None:
        """Samples when due, unless the run is to stop. Collective over: world (when due)."""
        if event.step % self._config.every == 0 and not self._stop.agreed:
            start = time.perf_counter()
            self._sample(event.step)
            self._hook_seconds["samples"] = self._hook_seconds.get("samples", 0.0) + time.perf_counter() - start

    def at_end(self, step: int) -> None:
        """The final checkpoint can be sampled at leisure."""

    def _sample(self, step: int) -> None:
        is_first = self._groups.layout.rank == 0
        # An attempt's own: an older one that is still alive must not write between these lines.
        scratch = self._folder / f"{_SCRATCH}{self._saver.own}"
        if is_first:
            for left_over in self._folder.glob(f"{_SCRATCH}*"):
                if left_over.name <= scratch.name:
                    shutil.rmtree(left_over, ignore_errors=True)
        dist.barrier(self._groups.host)
        try:
            checkpoint = self._saver.save_weights(scratch, step)
        except SaveFailed as error:  # a full disk, say; all ranks hear of it alike
            _log.error("step %d: nothing is sampled, the weights for it could not be written: %s", step, error)
            return
        if is_first:
            self._weights.attempt(lambda: self._use(checkpoint, step))  # the others wait for rank 0
            shutil.rmtree(scratch, ignore_errors=True)
        dist.barrier(self._groups.host)

    def _use(self, checkpoint: Path, step: int) -> None:
        device = self._groups.device
        # Building a model may draw from the generators that training draws from.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            try:
                model = load_trained(checkpoint, device)
            except UserError as error:  # written a moment ago: it is the disk's fault and not the user's
                raise OSError(str(error)) from error
            self._show(model, step)

    def _show(self, model: InferenceModel, step: int) -> None:
        told: dict[str, object] = {"step": step}
        if self._config.captions:
            ids, pictures = model.draw(self._config.captions, guidance_scale=self._config.guidance_scale)
            grid = sheet(pictures)
            self._files.attempt(lambda: Image.fromarray(grid).save(self._folder / f"step-{step:08d}.png"))
            use, entropy = code_use(ids, model.dialogue.geometry.codebook_size)
            self._sinks.image(step, "samples/drawings", grid)
            self._sinks.scalars(step, {"samples/codebook_use": use, "samples/code_entropy_bits": entropy})
            told |= {"captions": self._config.captions, "codebook_use": use, "code_entropy_bits": entropy}
        if self._config.questions and not self._stop.asked:
            side = model.dialogue.geometry.understanding_size
            prompts = [
                model.question(question, [understanding_view(picture, side)])
                for picture, question in zip(self._pictures, self._config.questions.values(), strict=True)
            ]
            answers = model.generate_text(prompts, max_new_tokens=self._config.max_new_tokens)
            told["answers"] = [
                {"picture": path, "question": question, "answer": answer}
                for (path, question), answer in zip(self._config.questions.items(), answers, strict=True)
            ]
            self._sinks.text(step, "samples/answers", json.dumps(told["answers"], indent=1, ensure_ascii=False))
        content = json.dumps(told, indent=1, ensure_ascii=False)
        self._files.attempt(lambda: write_whole(self._folder / f"step-{step:08d}.json", content + "\n"))
