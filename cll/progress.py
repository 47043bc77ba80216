"""Progress bars for long work."""

import os
import sys

from tqdm import tqdm as text_bar
from tqdm.auto import tqdm as live_bar


def progress_bar(total, description, unit="it", show=True):
    """A tqdm bar: live for people, a text line every 30 s when headless (CLL_HEADLESS=1).

    TQDM_DISABLE=1 silences it. show=False: a bar that shows nothing.
    """
    options = {"total": total, "desc": description, "unit": unit}
    if not show:
        return text_bar(**options, disable=True)
    if os.environ.get("CLL_HEADLESS"):  # widgets do not reach a log
        return text_bar(**options, mininterval=30, ascii=True, ncols=120, file=sys.stderr)
    if os.environ.get("TQDM_DISABLE"):  # the notebook's bar would still leave an empty widget
        return text_bar(**options, disable=True)
    return live_bar(**options, mininterval=0.5)
