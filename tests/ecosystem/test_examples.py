"""The examples that need anomalib, Lightning or a C++ compiler.

tests/test_examples.py runs the other scripts, and tests/test_docs.py the other pages.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import skimage.io

from tests.support.examples import ROOT, printed_values, run_example
from tests.support.pages import run

# torchvision has to be prepared in the script's process: see the function.
PREPARED = """
import runpy, sys
from tests.support import peers
peers.prepare_torchvision()
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_anomalib_fastflow(tmp_path: Path) -> None:
    """It finds the squares, and so does the file that it exports."""
    text = run_example("anomalib_fastflow.py", tmp_path, launcher=("-c", PREPARED))
    assert printed_values("# of # blocks run fused", text) == [24, 24]
    image, pixel = printed_values("image AUROC #, pixel AUROC #", text)
    assert image == 1.0  # of two images with a square and two without
    assert 0.9 <= pixel <= 1.0  # 0.5 is chance
    path = text.partition("exported to ")[2].splitlines()[0]
    session = onnxruntime.InferenceSession(path)
    scores = {
        kind: [_score(session, path) for path in sorted((tmp_path / "stripes" / kind).iterdir())]
        for kind in ("good", "defect")
    }
    assert (len(scores["good"]), len(scores["defect"])) == (16, 4)
    assert min(scores["defect"]) > max(scores["good"])


def _score(session: onnxruntime.InferenceSession, image: Path) -> float:
    pixels = skimage.io.imread(image).transpose(2, 0, 1)[None].astype(np.float32) / 255
    names = [output.name for output in session.get_outputs()]
    results = session.run(None, {session.get_inputs()[0].name: pixels})
    return float(np.asarray(results[names.index("pred_score")]).item())


def test_page_for_anomalib_users() -> None:
    path = ROOT / "docs" / "anomalib.md"
    assert run(path.read_text(), str(path)) == 3


def test_compiled_by_inductor(tmp_path: Path) -> None:
    text = run_example("compiled.py", tmp_path)
    assert "graphs: 1, breaks: 0\n" in text
    for batch in (8, 5, 100):
        errors = printed_values(f"batch {batch}: z, log_det, gradient differ by #, #, #", text)
        assert max(errors) <= 100 * 2.0**-24
