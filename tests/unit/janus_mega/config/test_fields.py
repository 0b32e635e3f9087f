"""The schema seen from outside."""

from data_pipeline.spec import SourceSpec
from janus_mega.config.fields import attribute_docs, leaf_fields, suggest, unknown_keys
from janus_mega.config.schema import RunConfig


def test_leaves_carry_type_and_documentation():
    leaves = {leaf.key: leaf for leaf in leaf_fields(RunConfig)}
    assert leaves["parallel.tp_size"].type is int
    assert leaves["parallel.tp_size"].doc == "Tensor-parallel ranks."
    assert leaves["data.sources.*.weight"].doc == attribute_docs(SourceSpec)["weight"]


def test_unknown_keys_at_every_depth():
    values = {"nmae": 1, "data": {"sources": {"a": {"wieght": 1, "path": "x"}}}, "loss": {"task_weights": {"free": 1}}}
    assert list(unknown_keys(RunConfig, values)) == ["nmae", "data.sources.a.wieght"]


def test_suggestions():
    assert suggest(RunConfig, "nmae") == "; did you mean 'name'?"
    assert suggest(RunConfig, "model.backbone.num_head") == "; did you mean 'model.backbone.num_heads'?"
    assert suggest(RunConfig, "data.sources.a.wieght") == "; did you mean 'data.sources.a.weight'?"
    assert suggest(RunConfig, "stage.lr") == "; did you mean 'optimizer.lr'?"
    assert suggest(RunConfig, "zzz") == ""
