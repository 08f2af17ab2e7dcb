"""`python -m compare`: see `compare.cli`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts the current folder first on the import path, where a downloaded file could take
    # the place of a library.
    if Path(sys.path[0]).resolve() != Path(__file__).resolve().parent.parent:
        del sys.path[0]
    from compare.cli import main

    main()
