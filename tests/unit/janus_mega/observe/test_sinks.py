"""Files that a run leaves: a line per step, events that TensorBoard reads back."""

import errno
import json
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from data_pipeline.errors import UserError
from janus_mega.observe.sinks import EVENTS_DIR, METRICS_FILE, SinkGroup, open_sinks, read_metrics
from tests.support.full_disk import fill, largest_file


def test_lines_are_appended_over_restarts_and_survive_a_cut(tmp_path):
    for step in (1, 2):
        with open_sinks(tmp_path, tensorboard=False) as sinks:
            sinks.scalars(step, {"loss": 1.0 / step, "broken": float("nan")})
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 3, "lo')
    rows = read_metrics(tmp_path)
    assert [(row["step"], row["loss"], row["broken"]) for row in rows] == [(1, 1.0, None), (2, 0.5, None)]
    assert json.loads((tmp_path / METRICS_FILE).read_text().splitlines()[0])["time_s"] > 0


def test_tensorboard_reads_back_scalars_and_pictures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_sinks(tmp_path, tensorboard=True) as sinks:
        sinks.scalars(7, {"loss/text": 0.25})
        sinks.image(7, "drawn", np.full((4, 6, 3), 255, dtype=np.uint8))
    events = EventAccumulator(str(tmp_path / EVENTS_DIR)).Reload()
    (scalar,) = events.Scalars("loss/text")
    assert (scalar.step, scalar.value) == (7, 0.25)
    (image,) = events.Images("drawn")
    assert (image.height, image.width) == (4, 6)


def test_a_sink_that_fails_takes_nothing_from_the_others():
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    got = []
    good = SimpleNamespace(scalars=lambda step, values: got.append(step), close=lambda: got.append("closed"))
    with SinkGroup([SimpleNamespace(scalars=full, close=full), good]) as sinks:
        sinks.scalars(1, {})
    assert got == [1, "closed"]


def test_other_ranks_write_nothing(tmp_path):
    with open_sinks(tmp_path, tensorboard=True, enabled=False) as sinks:
        sinks.scalars(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_a_picture_of_another_shape_is_refused(tmp_path):
    with open_sinks(tmp_path, tensorboard=False) as sinks, pytest.raises(ValueError, match="uint8"):
        sinks.image(1, "drawn", np.zeros((3, 4, 4), dtype=np.float32))


def test_weights_and_biases_is_refused_where_it_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("janus_mega.observe.sinks.find_spec", lambda name: None)
    for enabled in (True, False):
        with pytest.raises(UserError, match="logging.wandb=project.*pip install wandb"):
            open_sinks(tmp_path, tensorboard=False, wandb="project", enabled=enabled)
    assert list(tmp_path.iterdir()) == []


def test_weights_and_biases_gets_everything_under_its_step(tmp_path, monkeypatch):
    """A stand-in that notes calls; the package itself wants an account."""
    calls = []
    run = SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finished")
    )
    package = SimpleNamespace(
        init=lambda **options: calls.append(options) or run, Image=lambda pixels: pixels.shape, Html=lambda text: text
    )
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.setattr("janus_mega.observe.sinks.find_spec", lambda name: package)
    with open_sinks(tmp_path, tensorboard=False, wandb="project") as sinks:
        sinks.scalars(2, {"loss": 1.5})
        sinks.image(2, "drawn", np.zeros((4, 6, 3), np.uint8))
        sinks.text(2, "answers", "1 < 2")
    assert (calls[0]["project"], calls[0]["name"]) == ("project", tmp_path.name)
    assert calls[1:-1] == [(2, {"loss": 1.5}), (2, {"drawn": (4, 6, 3)}), (2, {"answers": "<pre>1 &lt; 2</pre>"})]
    assert calls[-1] == "finished"
    assert read_metrics(tmp_path)[0]["loss"] == 1.5


def test_texts_go_to_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_sinks(tmp_path, tensorboard=True) as sinks:
        sinks.text(3, "answers", "a seven")
    events = EventAccumulator(str(tmp_path / EVENTS_DIR)).Reload()
    (text,) = events.Tensors("answers/text_summary")
    assert text.tensor_proto.string_val == [b"a seven"]


def test_a_full_disk_costs_lines_and_no_run(tmp_path, caplog):
    fill(tmp_path / METRICS_FILE)
    with open_sinks(tmp_path, tensorboard=False) as sinks:
        for step in (1, 2, 3):
            sinks.scalars(step, {"loss": 1.0})
    (said,) = [record.getMessage() for record in caplog.records]
    assert str(tmp_path / METRICS_FILE) in said and "No space left on device" in said


def test_a_place_that_takes_no_file_is_told_at_the_start(tmp_path):
    (tmp_path / METRICS_FILE).mkdir()
    with pytest.raises(IsADirectoryError):
        open_sinks(tmp_path, tensorboard=False)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_goes_on_in_a_new_file_once_there_is_room(tmp_path, caplog):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_sinks(tmp_path, tensorboard=True) as sinks:
        sinks.scalars(1, {"loss": 1.0})
        with largest_file(1000):
            for step in range(2, 8):
                sinks.text(step, "answers", "x" * 2000)
                time.sleep(0.05)  # a thread writes it, and fails
        sinks.scalars(9, {"loss": 0.5})
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "TensorBoard" in said[0] and "written again" in said[1]
    assert len(list((tmp_path / EVENTS_DIR).iterdir())) == 2
    assert [event.step for event in EventAccumulator(str(tmp_path / EVENTS_DIR)).Reload().Scalars("loss")] == [1, 9]
    assert [row["loss"] for row in read_metrics(tmp_path)] == [1.0, 0.5]


def test_a_sink_that_cannot_be_closed_leaves_the_error_of_the_run(tmp_path, monkeypatch):
    def finish():
        raise ConnectionError

    package = SimpleNamespace(init=lambda **options: SimpleNamespace(finish=finish))
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.setattr("janus_mega.observe.sinks.find_spec", lambda name: package)
    with pytest.raises(KeyError), open_sinks(tmp_path, tensorboard=False, wandb="project"):
        raise KeyError
