"""Build an onnxruntime-genai folder: `convert_onnx.py MODEL_DIR OUT_DIR fp32|bf16 NUM_THREADS`.

Runs in onnxruntime-genai's interpreter (its own model builder, execution provider cpu), then sets
the thread count and moves EOS out of the way in genai_config.json, so that no run ends early.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from ortgenai_worker import PAD_TOKEN_ID


def convert(model: Path, out: Path, precision: str, num_threads: int) -> None:
    """Run the builder and adjust its configuration."""
    with tempfile.TemporaryDirectory() as cache:
        subprocess.run(
            [
                *(sys.executable, "-m", "onnxruntime_genai.models.builder", "-e", "cpu"),
                *("-i", str(model), "-o", str(out), "-p", precision, "-c", cache),
            ],
            check=True,
            stdout=sys.stderr,
        )
    path = out / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["pad_token_id"] = PAD_TOKEN_ID
    config["model"]["eos_token_id"] = PAD_TOKEN_ID
    options = config["model"]["decoder"]["session_options"]
    options["intra_op_num_threads"] = num_threads
    options["inter_op_num_threads"] = 1
    path.write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
