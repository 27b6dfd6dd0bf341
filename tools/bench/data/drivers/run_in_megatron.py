"""Runs a script of a Megatron-LM repository unchanged: REPOSITORY SCRIPT ARGUMENTS...

Its newest version imports ``typing.override``, which Python 3.11 does not have; it gets the one of typing_extensions.
"""

import os
import runpy
import sys
import typing

if not hasattr(typing, "override"):
    import typing_extensions

    typing.override = typing_extensions.override

if __name__ == "__main__":
    repository, script = sys.argv[1:3]
    sys.path.insert(0, repository)
    sys.argv = [os.path.join(repository, script), *sys.argv[3:]]
    runpy.run_path(sys.argv[0], run_name="__main__")
