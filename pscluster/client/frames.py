"""Where a user's code raised, found in the traceback that a job carries. Pure."""

from __future__ import annotations

import re
from pathlib import PurePath

_FRAME = re.compile(r'^\s*File "(?P<file>.+)", line (?P<line>\d+)(?:, in (?P<name>.+))?$', re.MULTILINE)


def last_frame(traceback: str) -> str:
    """The last frame in the user's own files, as "task.py:16 in loss"; empty when there is none.

    A job's traceback begins with the user's first frame: what lies in that file's directory is the user's. Of chained
    errors the last one counts, which is the one that was raised in the end."""
    *_, last = traceback.rpartition("Traceback (most recent call last):")
    frames = list(_FRAME.finditer(last))
    if not frames:
        return ""
    directory = PurePath(frames[0]["file"]).parent
    own = [frame for frame in frames if PurePath(frame["file"]).is_relative_to(directory)]
    file = PurePath(own[-1]["file"]).relative_to(directory)
    name = own[-1]["name"]
    return f"{file}:{own[-1]['line']}" + (f" in {name}" if name else "")
