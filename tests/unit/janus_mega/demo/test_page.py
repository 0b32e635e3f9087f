"""The demo's page shows what it is given, and stands when little is given."""

import numpy as np

from janus_mega.demo.page import Answered, PageContent, PartRow, build_page
from janus_mega.demo.targets import judge_figures


def test_a_full_page_holds_every_section():
    pictures = np.random.default_rng(0).integers(0, 255, size=(40, 16, 16)).astype(np.uint8)
    content = PageContent(
        verdicts=judge_figures({"und_accuracy": 0.98, "gen_accuracy": 0.5}),
        curves={"stage1": [{"step": step, "loss/text": 5.0 / step, "grad_norm": 1.0} for step in (1, 2, 3)]},
        drawings=np.repeat(pictures[:, None], 3, axis=1),
        asked=np.arange(40) % 10,
        reconstructions=(pictures[:5], pictures[5:10]),
        answers={"questions": [Answered(pictures[:2], "three four", is_right=False)]},
        confusions={"understanding": np.eye(10, 11, dtype=np.int64)},
        guidance=[{"guidance scale": 2.0, "accuracy": 0.9}],
        layouts=[{"layout": "tp 2", "loss": 1e-6}],
        parts=[PartRow("backbone", 1000, "scratch", ("stage2", "stage3"))],
        details={"pair_accuracy_unseen": 0.91},
        seconds={"raw data": 3.0},
        versions={"torch": "2.x"},
        settings="full run",
    )
    html = build_page(content).render()
    for expected in ("und_accuracy", "met</td>", "missed</td>", "stage1: loss", "three four", "tp 2", "stage2, stage3"):
        assert expected in html
    assert html.count("data:image/png;base64,") == 3
    assert html.count("not measured") == 14


def test_an_empty_page_says_what_is_missing():
    html = build_page(PageContent(verdicts=judge_figures({}))).render()
    assert "Nothing was drawn." in html and "The layout check did not run." in html
