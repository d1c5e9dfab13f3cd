"""DiffRate's command line: `python main.py --help`. The words go to `cli/`; its errors come back as one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cli.flags import check_paths, get_args_parser, parse_flags
from diffrate.atomic import one_line
from diffrate.files.header import SavedModelError
from utils import STOPPED, UsageError, leave, stop_in_time

__all__ = ["get_args_parser", "main"]


def main(words: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code. Bad input is one line on standard error and 2."""
    try:
        settings = parse_flags(words)
        check_paths(settings)
    except (UsageError, SavedModelError) as error:
        print(f"main.py: error: {one_line(str(error))}", file=sys.stderr)
        return 2
    from cli.start import explain, run  # torch comes with it, and takes seconds

    try:
        run(settings)
    except KeyboardInterrupt:
        return STOPPED
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise
        line, code = explained
        print(f"main.py: {one_line(line)}", file=sys.stderr)
        return code
    return 0


if __name__ == "__main__":
    stop_in_time()
    code = main()
    if code in (0, 2):
        sys.exit(code)
    leave(code)
