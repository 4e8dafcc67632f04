"""The original scripts/txt2img.py's command line, flag for flag; the work is done by `sfumato txt2img`.

Said differences: without --ckpt the model in the box draws, at its own size; picture i has its own generator, seeded
with seed + i; --laion400m's model is of no known family; what is flagged is blurred, not replaced by another picture,
and no mark is put into pictures below 256 x 256 px, nor a check made where no checker is at hand.
"""

from __future__ import annotations

import sys

from sfumato.cli.drawing import original_script, run
from sfumato.cli.main import run_command
from sfumato.cli.txt2img import ORIGINAL

if __name__ == "__main__":
    sys.exit(run_command(run, original_script(ORIGINAL, "txt2img.py"), "txt2img.py"))
