"""The processes that a launcher started, as each of them sees itself."""

import subprocess
import sys

import pytest

CODE = """
import logging
from manipulators._processes import Processes
Processes({rank}, 2).quieten()
logging.getLogger("manipulators.training").warning("said")
"""


@pytest.mark.parametrize(("rank", "said"), [(0, "said\n"), (1, "")])
def test_what_every_process_would_say_the_main_one_says(rank, said):
    done = subprocess.run([sys.executable, "-c", CODE.format(rank=rank)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, said)
