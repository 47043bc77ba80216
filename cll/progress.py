"""Progress bars for long work."""

import os
import sys

from tqdm import tqdm


def progress_bar(total, description, unit="it", show=True):
    """A tqdm bar: live for people, a text line every 20 s when headless (CLL_HEADLESS=1).

    It appears when work turns out to be long. TQDM_DISABLE=1 silences it. show=False: a bar that
    shows nothing.
    """
    silent = not show or bool(os.environ.get("TQDM_DISABLE"))
    options = {"total": total, "desc": description, "unit": unit, "delay": 1, "disable": silent}
    if silent:
        return tqdm(**options)
    if os.environ.get("CLL_HEADLESS"):  # widgets do not reach a log
        return tqdm(**options, mininterval=20, ascii=True, ncols=120, file=sys.stderr)
    from tqdm.auto import tqdm as live_bar  # only here: it warns where ipywidgets is absent

    return live_bar(**options, mininterval=0.5)
