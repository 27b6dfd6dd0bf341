"""The command line, as a module or a file: ``torchrun .../modalities/__main__.py run config.yaml``."""

from modalities_cli.__main__ import main

if __name__ == "__main__":
    main()
