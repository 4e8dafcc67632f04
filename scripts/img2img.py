"""The original scripts/img2img.py's command line, flag for flag; the work is done by `sfumato img2img`.

Said differences: without --ckpt the model in the box draws; picture i has its own generator, seeded with seed + i, and
the latents are the posterior's mean; --like compvis takes steps as the original does.
"""

from __future__ import annotations

import sys

from sfumato.cli.drawing import original_script, run
from sfumato.cli.img2img import ORIGINAL
from sfumato.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command(run, original_script(ORIGINAL, "img2img.py"), "img2img.py"))
