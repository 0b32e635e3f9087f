"""What chance decides about a document while it is read: keyed by (seed, uid, epoch), never by who reads it when."""

import numpy as np

from data_pipeline.manifest import Source
from data_pipeline.plan.order import choice_keys, happens, stream_key
from data_pipeline.spec import DataSpec


class Choices:
    """The random choices of one run, for many samples of a source at once."""

    def __init__(self, spec: DataSpec) -> None:
        self._guidance_dropout = spec.guidance_dropout
        self._guidance_key = stream_key("guidance", spec.seed)
        self._variant_key = stream_key("variant", spec.seed)

    def drops_prompt(self, source: Source, sample_nos: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """bool [n]: whether guidance dropout takes the prompt; drawings only."""
        if source.kind != "t2i" or self._guidance_dropout <= 0:
            return np.zeros(len(sample_nos), bool)
        return happens(choice_keys(self._guidance_key, source.uids[sample_nos], epochs), self._guidance_dropout)

    def variant(self, source: Source, sample_nos: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """int64 [n]: which of the stored crops of a picture is drawn."""
        images = source.manifest.image_tokenizer
        if images is None or images.num_variants == 1:
            return np.zeros(len(sample_nos), np.int64)
        keys = choice_keys(self._variant_key, source.uids[sample_nos], epochs)
        return (keys % np.uint64(images.num_variants)).astype(np.int64)
