"""Prose from docstrings: deterministic, split by module, nothing twice."""

from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from janus_mega.demo import prose

LONG = "A sentence that is long enough to be taken for prose by the collector, number "


def write_library(root: Path, modules: int) -> None:
    for number in range(modules):
        (root / f"module_{number:03d}.py").write_text(f'"""{LONG}{number}."""\n\ndef f():\n    """{LONG}shared."""\n')


def test_modules_are_on_one_side_and_texts_occur_once(tmp_path):
    write_library(tmp_path, 120)
    corpus = prose.collect_prose(tmp_path)
    sides = [{text.uid.partition(":")[0] for text in side} for side in (corpus.train, corpus.held_out)]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    texts = [text.text for side in (corpus.train, corpus.held_out) for text in side]
    assert len(texts) == len(set(texts)) == 121
    shared = f"{LONG}shared."
    assert shared in {text.text for text in corpus.train}


def test_labels_sessions_tests_and_broken_files_are_left_out(tmp_path):
    write_library(tmp_path, 60)
    (tmp_path / "short.py").write_text('"""Too short."""\n')
    (tmp_path / "session.py").write_text(f'"""{LONG}\n>>> 1 + 1\n2\n"""\n')
    (tmp_path / "broken.py").write_text('"""' + LONG + '"""\ndef (:\n')
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "inner.py").write_text(f'"""{LONG}inside a test."""\n')
    corpus = prose.collect_prose(tmp_path)
    modules = {text.uid.partition(":")[0] for side in (corpus.train, corpus.held_out) for text in side}
    assert not modules & {"short.py", "session.py", "broken.py", "test/inner.py"}


def test_the_standard_library_gives_a_corpus():
    corpus = prose.collect_prose()
    assert sum(len(text.text) for text in corpus.train) > 500_000
    assert sum(len(text.text) for text in corpus.held_out) > 20_000


def test_the_corpus_is_the_same_twice(tmp_path):
    write_library(tmp_path, 60)
    assert prose.collect_prose(tmp_path) == prose.collect_prose(tmp_path)


def test_a_python_without_sources_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="docstrings found") as refusal:
        prose.collect_prose(tmp_path)
    assert "\n" not in str(refusal.value)
