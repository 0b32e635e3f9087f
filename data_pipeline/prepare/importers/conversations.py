"""Conversations as LLaVA and ShareGPT store them: turns by human and gpt, or by user and assistant.

Pictures are called by `<image>` inside a turn, in the order of `image` or `images`; the marks stay in the text, and
the renderer puts the pictures there. Turns must take each other's place: a system turn first, then human, gpt, human...
A last turn that nobody answered is left out.
"""

from typing import Any

from data_pipeline.prepare.records import Reject, checked_text

IMAGE_MARK = "<image>"

_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
}


def is_conversation(row: dict[str, Any]) -> bool:
    """Whether a row has this form."""
    return isinstance(row.get("conversations"), list) or isinstance(row.get("messages"), list)


def conversation_fields(row: dict[str, Any]) -> dict[str, Any]:
    """The row as `{"conversation": [{"role", "text"}], "images": [...]}`.

    Raises:
        Reject: Unknown roles, or a turn without text.
    """
    given = row.get("conversations", row.get("messages"))
    if not isinstance(given, list):
        raise Reject("bad_record", "a conversation must have the list 'conversations' or 'messages'")
    turns = [_turn(part) for part in given]
    while turns and turns[-1]["role"] == "user":
        turns.pop()
    images = row.get("images", row.get("image"))
    fields = {name: value for name, value in row.items() if name not in ("conversations", "messages", "image")}
    fields["images"] = [] if images is None or images == "" else images if isinstance(images, list) else [images]
    return fields | {"conversation": turns}


def _turn(part: Any) -> dict[str, str]:
    if not isinstance(part, dict):
        raise Reject("bad_record", "a turn must be an object")
    role = part.get("from", part.get("role"))
    if not isinstance(role, str) or role.lower() not in _ROLES:
        raise Reject("bad_roles", f"a turn is by {role!r}; known are {', '.join(_ROLES)}")
    return {"role": _ROLES[role.lower()], "text": checked_text(part.get("value", part.get("content")), "value")}
