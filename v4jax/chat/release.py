"""The release whose wording a checkpoint was trained on, by its encoder, which is read, never run.

Only what asks for effort differs between releases (`EFFORTS` of v4jax/chat/encoding.py).

Next file to read: v4jax/chat/parse.py.
"""

import re
from typing import NamedTuple

from v4jax import storage
from v4jax.chat.encoding import EFFORTS
from v4jax.config.json_styles import read_config_json
from v4jax.config.releases import read_dspark, vision_layers
from v4jax.storage import Place, checkpoint_path
from v4jax.untrusted import file_below

ENCODER = "encoding/encoding_dsv4.py"
"""The released encoder, beside config.json."""
PROFILE = "dsv4_reasoning_effort_profile"
_BY_PROFILE = {"official": "0731", "preview": "v4"}
_BY_CONSTANT = {"REASONING_EFFORT_PROMPTS": "0731", "REASONING_EFFORT_MAX": "v4"}
"""A constant that the encoder defines -> its release."""
_LONGEST = 2**20
"""Bytes of an encoder; the longest has 37,000."""


class ChatRelease(NamedTuple):
    """A key of EFFORTS, and what says so.

    Attributes:
      why: where it was found, in words.
    """

    name: str
    why: str

    def __str__(self) -> str:
        return f"release {self.name} ({self.why})"


def chat_release(directory, given: str | None = None) -> ChatRelease:
    """The release of a checkpoint's chat format.

    It is the user's, else the encoder's, else what config.json says.

    Args:
      given: the user's choice; None or "": none.

    Raises:
      ValueError: another release, an encoder that cannot be read, or an unknown profile.
    """
    if given:
        if given not in EFFORTS:
            raise ValueError(f"release: got {given!r}; allowed: {', '.join(EFFORTS)}")
        return ChatRelease(given, "as asked for")
    folder = checkpoint_path(directory, "directory")
    text = _encoder(folder)
    for constant, name in _BY_CONSTANT.items():
        if text is not None and re.search(rf"^{constant}\b", text, re.MULTILINE):
            return ChatRelease(name, ENCODER)
    found = _of_config(folder)
    if text is None:
        return found
    return ChatRelease(found.name, f"{found.why}; {ENCODER} defines no {' or '.join(_BY_CONSTANT)}")


def _encoder(folder: Place) -> str | None:
    """The text of the checkpoint's encoder; None without one."""
    try:
        path = file_below(folder, ENCODER)
        size = storage.size(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    if size > _LONGEST:
        raise ValueError(f"{folder}: {ENCODER}: got {size} bytes; must be at most {_LONGEST}")
    return storage.read(path).decode("utf-8", "replace")


def _of_config(folder: Place) -> ChatRelease:
    raw = read_config_json(folder / "config.json")
    if PROFILE in raw:
        if raw[PROFILE] not in _BY_PROFILE:
            allowed = ", ".join(_BY_PROFILE)
            raise ValueError(
                f"{folder}/config.json: {PROFILE}: got {raw[PROFILE]!r}; allowed: {allowed}"
            )
        return ChatRelease(_BY_PROFILE[raw[PROFILE]], f"config.json: {PROFILE}")
    if vision_layers(raw):
        return ChatRelease("0731", "config.json: vision_n_layers")
    if read_dspark(raw) is None:
        return ChatRelease("v4", "config.json: no dspark_* keys")
    doubt = "config.json: dspark_* keys; Flash-DSpark has them too, and no encoder tells them apart"
    return ChatRelease("0731", f"{doubt}: --release decides")
